// What activation.h is asked to do; as task.h, included by files that are compiled for one instruction set.
#pragma once

#include "task.h"

namespace alisa {

// x / (1 + exp(-u)), with u = x, or u = sqrt(8 / pi) (x + 0.044715 x^3): GELU by tanh; GELU itself; max(x, 0).
enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

struct ActivationTask {
  Activation kind;
  Dtype dtype;
  const void* x;  // [N, width], or [N, 2, width]: what is activated, and what it is multiplied with
  void* out;      // [N, width]; may be x where nothing is multiplied
  int width;
  bool gated;
  int64_t num_tokens;  // N
};

}  // namespace alisa
