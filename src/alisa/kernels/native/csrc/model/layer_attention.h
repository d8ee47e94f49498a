// What attends in the layers of a step that a stack runs from the first to the last.
#pragma once

#include "threads.h"

namespace alisa {

class LayerAttention {
 public:
  virtual ~LayerAttention() = default;
  // The output [N, H, D] of a layer, whose queries, keys and values lie where the step has those of every layer.
  virtual const void* attend(int layer, const Threads& threads) = 0;
};

}  // namespace alisa
