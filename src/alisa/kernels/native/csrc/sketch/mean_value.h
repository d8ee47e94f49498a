// The mean of the values of a sequence, and what it adds to attention that read a part of them.
#pragma once

#include "elements.h"
#include "mean_task.h"

namespace alisa::ALISA_ISA {

// One head of values, the rest of a vector included, and one head of means.
inline size_t mean_floats(int head_dim) { return 2 * static_cast<size_t>(round_up(head_dim, kPad)); }

// Every token is added to its sequence, in the order of the tokens.
inline void mean_add(const MeanAddTask& task, float* memory) {
  const int dim = task.head_dim;
  const size_t head_bytes = static_cast<size_t>(dim) * value_bytes(task.dtype);
  for (int64_t n = 0; n < task.num_tokens; ++n) {
    const uint8_t* values = static_cast<const uint8_t*>(task.values) + static_cast<size_t>(n) * task.stride;
    double* sums = task.sums + static_cast<size_t>(task.req_index[n]) * task.num_kv_heads * dim;
    for (int g = 0; g < task.num_kv_heads; ++g, values += head_bytes, sums += dim) {
      widen(task.dtype, values, dim, memory);
      for (int i = 0; i < dim; ++i) sums[i] += static_cast<double>(memory[i]);
    }
  }
}

// out = mean + share * (read - mean) for every head of one sequence.
inline void mean_blend(const MeanBlendTask& task, int seq, float* memory) {
  const int dim = task.head_dim;
  const int group = task.num_heads / task.num_kv_heads;
  const size_t head_bytes = static_cast<size_t>(dim) * value_bytes(task.dtype);
  const size_t first = static_cast<size_t>(seq) * task.num_heads;
  const auto* read = static_cast<const uint8_t*>(task.read) + first * head_bytes;
  auto* out = static_cast<uint8_t*>(task.out) + first * head_bytes;
  const double* sums = task.sums + static_cast<size_t>(task.req_index[seq]) * task.num_kv_heads * dim;
  const double inverse = 1.0 / task.lengths[seq];
  float* mean = memory + round_up(dim, kPad);
  for (int h = 0; h < task.num_heads; ++h, read += head_bytes, out += head_bytes) {
    if (h % group == 0) {
      for (int i = 0; i < dim; ++i) mean[i] = static_cast<float>(sums[i] * inverse);
      sums += dim;
    }
    const float share = task.shares[first + h];
    widen(task.dtype, read, dim, memory);
    // What was read in full stays as it is, to the bit.
    for (int i = 0; i < dim; ++i) memory[i] = share >= 1.0F ? memory[i] : mean[i] + share * (memory[i] - mean[i]);
    narrow(task.dtype, memory, dim, out);
  }
}

}  // namespace alisa::ALISA_ISA
