// Heads in another basis. Each output is added up channel by channel, so that a token's result depends on it alone.
#pragma once

#include "elements.h"
#include "turn_task.h"

namespace alisa::ALISA_ISA {

// kVectors vectors of x M - shift, from column `first` on.
template <int kVectors>
inline void turn_columns(const float* x, const float* matrix, const float* shift, int dim, int stride, int first, float* out) {
  F sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = set1(0.0F) - load(shift + first + i * kWidth);
  for (int d = 0; d < dim; ++d) {
    const F value = set1(x[d]);
    const float* row = matrix + static_cast<size_t>(d) * stride + first;
    for (int i = 0; i < kVectors; ++i) sums[i] = fma(value, load(row + i * kWidth), sums[i]);
  }
  for (int i = 0; i < kVectors; ++i) store(out + first + i * kWidth, sums[i]);
}

// Tokens [first, last).
inline void turn(const TurnTask& task, int64_t first, int64_t last, float* scratch) {
  const int dim = task.head_dim;
  const int stride = task.padded();
  const int group = task.num_heads / task.num_kv_heads;
  const size_t head_bytes = static_cast<size_t>(dim) * value_bytes(task.dtype);
  float* x = scratch;
  float* out = scratch + stride;
  for (int64_t token = first; token < last; ++token) {
    const auto* source = static_cast<const uint8_t*>(task.heads) + static_cast<size_t>(token) * task.stride;
    auto* target = static_cast<uint8_t*>(task.out) + static_cast<size_t>(token) * task.num_heads * head_bytes;
    for (int h = 0; h < task.num_heads; ++h) {
      const float* matrix = task.matrices + static_cast<size_t>(h / group) * dim * stride;
      const float* shift = task.shifts + static_cast<size_t>(h / group) * stride;
      widen(task.dtype, source + h * head_bytes, dim, x);
      int column = 0;
      for (; column + 4 * kWidth <= stride; column += 4 * kWidth) turn_columns<4>(x, matrix, shift, dim, stride, column, out);
      for (; column < stride; column += kWidth) turn_columns<1>(x, matrix, shift, dim, stride, column, out);
      narrow(task.dtype, out, dim, target + h * head_bytes);
    }
  }
}

}  // namespace alisa::ALISA_ISA
