// Scales and minima of coded rows, applied to products and weights of a whole block at once instead of to every code.
//
// With value = minimum + scale * code, a score is scale * (q codes) + minimum * sum(q), and an output is the sum of
// (weight * scale) * codes plus one number for all dimensions, the sum of weight * minimum. Each part of a head has a pair of its
// own: its score is one of a sum, its output a piece of the head's.
#pragma once

#include <cstring>

#include "block_rows.h"

namespace alisa::ALISA_ISA {

// Pairs lie after everything else in a row, where no reader comes by before they are needed. Inlined by force, see Ahead.
ALISA_INLINE void prefetch_pairs(const RowLayout& layout, const BlockRows& rows, int first, int count) {
  const size_t half = 4 * static_cast<size_t>(layout.num_pairs());
  const size_t offset = layout.pairs_at() + 4 * static_cast<size_t>(rows.first_kv_head * layout.parts);
  for (int r = first; r < first + count; ++r) {
    for (size_t i = 0; i < 4 * static_cast<size_t>(rows.num_kv_heads * layout.parts); i += 64) {
      __builtin_prefetch(rows.row[r] + offset + i, 0, 3);
      __builtin_prefetch(rows.row[r] + offset + half + i, 0, 3);
    }
  }
}

// The pairs of two parts in two rows, turned round. One by one this took a quarter of the whole call.
inline void turn_pairs(const uint8_t* row, const uint8_t* next_row, uint32_t* part, uint32_t* next_part) {
  uint64_t a, b;
  std::memcpy(&a, row, 8);
  std::memcpy(&b, next_row, 8);
  const uint64_t low = (a & 0xffffffffU) | b << 32;
  const uint64_t high = a >> 32 | (b >> 32 << 32);
  std::memcpy(part, &low, 8);
  std::memcpy(next_part, &high, 8);
}

// Pairs of the block at hand to [2, G, P, kBlock] (of K, then of V): those of one part lie side by side, as its weights do.
inline void gather_pairs(const RowLayout& layout, const BlockRows& rows, uint32_t* pairs) {
  const int first_part = rows.first_kv_head * layout.parts;
  const int last_part = first_part + rows.num_kv_heads * layout.parts;
  const int count = round_up(rows.count, kPanel);
  for (int half = 0; half < 2; ++half, pairs += static_cast<size_t>(layout.num_pairs()) * kBlock) {
    const size_t offset = layout.pairs_at() + 4 * static_cast<size_t>(half * layout.num_pairs());
    for (int r = 0; r < count; r += 2) {
      const uint8_t* row = rows.row[r] + offset;
      const uint8_t* next_row = rows.row[r + 1] + offset;
      int i = first_part;
      for (; i + 1 < last_part; i += 2) {
        turn_pairs(row + 4 * i, next_row + 4 * i, pairs + i * kBlock + r, pairs + (i + 1) * kBlock + r);
      }
      if (i < last_part) {
        std::memcpy(pairs + i * kBlock + r, row + 4 * i, 4);
        std::memcpy(pairs + i * kBlock + r + 1, next_row + 4 * i, 4);
      }
    }
    for (int i = first_part; i < last_part; ++i) {
      for (int r = count; r < kBlock; ++r) pairs[i * kBlock + r] = 0;
    }
  }
}

// Products of one part of a head with codes become scores of the part; `kMore`: and are added to those of the parts before it.
template <bool kMore>
inline void apply_keys(const uint32_t* pairs, float query_sum, const float* products, float* scores) {
  for (int i = 0; i < kBlock; i += kWidth) {
    F scale, minimum;
    load_f16_pairs(pairs + i, scale, minimum);
    const F score = load(products + i) * scale + minimum * set1(query_sum);
    store(scores + i, kMore ? load(scores + i) + score : score);
  }
}

// Weights of one head become weights of codes of a part; returns what its minima add to every dimension.
inline float apply_values(const uint32_t* pairs, const float* weights, float* scaled) {
  F shift = set1(0.0F);
  for (int i = 0; i < kBlock; i += kWidth) {
    F scale, minimum;
    load_f16_pairs(pairs + i, scale, minimum);
    const F weight = load(weights + i);
    store(scaled + i, weight * scale);
    shift = fma(weight, minimum, shift);
  }
  return sum_of(shift);
}

}  // namespace alisa::ALISA_ISA
