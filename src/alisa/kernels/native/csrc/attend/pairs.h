// Scales and minima of coded rows, applied to products and weights of a whole block at once instead of to every code.
//
// With value = minimum + scale * code, a score is scale * (q codes) + minimum * sum(q), and an output is the sum of
// (weight * scale) * codes plus one number for all dimensions, the sum of weight * minimum.
#pragma once

#include <cstring>

#include "block_rows.h"

namespace alisa::ALISA_ISA {

// Pairs lie after everything else in a row, where no reader comes by before they are needed. Inlined by force, see Ahead.
ALISA_INLINE void prefetch_pairs(const RowLayout& layout, const BlockRows& rows, int first, int count) {
  const size_t half = 4 * static_cast<size_t>(layout.num_kv_heads);
  const size_t offset = layout.pairs_at() + 4 * static_cast<size_t>(rows.first_kv_head);
  for (int r = first; r < first + count; ++r) {
    for (size_t i = 0; i < 4 * static_cast<size_t>(rows.num_kv_heads); i += 64) {
      __builtin_prefetch(rows.row[r] + offset + i, 0, 3);
      __builtin_prefetch(rows.row[r] + offset + half + i, 0, 3);
    }
  }
}

// The pairs of two heads in two rows, turned round. One by one this took a quarter of the whole call.
inline void turn_pairs(const uint8_t* row, const uint8_t* next_row, uint32_t* head, uint32_t* next_head) {
  uint64_t a, b;
  std::memcpy(&a, row, 8);
  std::memcpy(&b, next_row, 8);
  const uint64_t low = (a & 0xffffffffU) | b << 32;
  const uint64_t high = a >> 32 | (b >> 32 << 32);
  std::memcpy(head, &low, 8);
  std::memcpy(next_head, &high, 8);
}

// Pairs of the block at hand to [2, G, kBlock] (of K, then of V): those of one head lie side by side, as its weights do.
inline void gather_pairs(const RowLayout& layout, const BlockRows& rows, uint32_t* pairs) {
  const int last_head = rows.first_kv_head + rows.num_kv_heads;
  const int count = round_up(rows.count, kPanel);
  for (int half = 0; half < 2; ++half, pairs += static_cast<size_t>(layout.num_kv_heads) * kBlock) {
    const size_t offset = layout.pairs_at() + 4 * static_cast<size_t>(half * layout.num_kv_heads);
    for (int r = 0; r < count; r += 2) {
      const uint8_t* row = rows.row[r] + offset;
      const uint8_t* next_row = rows.row[r + 1] + offset;
      int i = rows.first_kv_head;
      for (; i + 1 < last_head; i += 2) {
        turn_pairs(row + 4 * i, next_row + 4 * i, pairs + i * kBlock + r, pairs + (i + 1) * kBlock + r);
      }
      if (i < last_head) {
        std::memcpy(pairs + i * kBlock + r, row + 4 * i, 4);
        std::memcpy(pairs + i * kBlock + r + 1, next_row + 4 * i, 4);
      }
    }
    for (int i = rows.first_kv_head; i < last_head; ++i) {
      for (int r = count; r < kBlock; ++r) pairs[i * kBlock + r] = 0;
    }
  }
}

// Products of one head with codes become scores.
inline void apply_keys(const uint32_t* pairs, float query_sum, float* scores) {
  for (int i = 0; i < kBlock; i += kWidth) {
    F scale, minimum;
    load_f16_pairs(pairs + i, scale, minimum);
    store(scores + i, load(scores + i) * scale + minimum * set1(query_sum));
  }
}

// Weights of one head become weights of codes; returns what the minima add to every dimension.
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
