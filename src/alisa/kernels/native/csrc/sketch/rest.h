// Attention that read a part of the tokens, and what a sketch of the values says of the others.
#pragma once

#include "elements.h"
#include "mean_task.h"

namespace alisa::ALISA_ISA {

// out = share * read + rest for every head of one sequence; `memory` takes one head.
inline void rest_blend(const RestBlendTask& task, int seq, float* memory) {
  const int dim = task.head_dim;
  const size_t head_bytes = static_cast<size_t>(dim) * value_bytes(task.dtype);
  const size_t first = static_cast<size_t>(seq) * task.num_heads;
  const auto* read = static_cast<const uint8_t*>(task.read) + first * head_bytes;
  auto* out = static_cast<uint8_t*>(task.out) + first * head_bytes;
  const float* rest = task.rest + first * dim;
  for (int h = 0; h < task.num_heads; ++h, read += head_bytes, out += head_bytes, rest += dim) {
    const float share = task.shares[first + h];
    widen(task.dtype, read, dim, memory);
    // What was read in full stays as it is, to the bit.
    for (int i = 0; i < dim; ++i) memory[i] = share >= 1.0F ? memory[i] : rest[i] + share * memory[i];
    narrow(task.dtype, memory, dim, out);
  }
}

}  // namespace alisa::ALISA_ISA
