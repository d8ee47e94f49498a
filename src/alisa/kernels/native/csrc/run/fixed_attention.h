// All layers of a decode step that read tokens which are known before the first layer runs, the same in each.
#pragma once

#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#include "layer_attention.h"
#include "workspace.h"

namespace alisa {

class FixedAttention : public LayerAttention {
 public:
  // `rows` and `attend` without addresses of rows, which `layers` has. Pointers are the caller's.
  FixedAttention(Workspace& workspace, const Isa& isa, const EncodeTask& rows, int64_t num_tokens, const DecodeTask& attend,
                 std::vector<uint8_t*> layers)
      : workspace_(workspace), isa_(isa), rows_(rows), num_tokens_(num_tokens), attend_(attend), layers_(std::move(layers)) {}

  const void* attend(int layer, const Threads& threads) override {
    const auto start = std::chrono::steady_clock::now();
    EncodeTask rows = rows_;
    rows.rows = layers_[static_cast<size_t>(layer)];
    workspace_.encode(isa_, rows, num_tokens_, threads);
    DecodeTask attend = attend_;
    attend.rows = rows.rows;
    workspace_.decode(isa_, attend, threads);
    nanoseconds_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
    return attend.out;
  }
  // Of all layers so far.
  double seconds() const { return static_cast<double>(nanoseconds_) * 1e-9; }

 private:
  Workspace& workspace_;
  const Isa& isa_;
  const EncodeTask rows_;
  const int64_t num_tokens_;
  const DecodeTask attend_;
  const std::vector<uint8_t*> layers_;
  int64_t nanoseconds_ = 0;
};

}  // namespace alisa
