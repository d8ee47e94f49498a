// New tokens as rows, written where they will stay.
//
// Integer rows are asymmetric: for every part of a head of K and of V the minimum, rounded down to float16, and the scale that
// reaches the maximum, rounded up, so that nothing is clipped and a value moves by at most half a step. Minima saturate at
// the range of float16 (-65504). `IntCodec` in alisa.cache.codec is the same arithmetic in torch, bit for bit.
#pragma once

#include "elements.h"
#include "float16.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// The largest float16 that is not above x, for x in the range of float16.
inline uint16_t float16_below(float x) {
  const uint16_t half = float16_bits(x);
  if (float16_value(half) <= x) return half;
  if (half & 0x8000U) return static_cast<uint16_t>(half + 1);
  return half == 0 ? 0x8001U : static_cast<uint16_t>(half - 1);
}

// The smallest float16 that is not below x, for x in [0, 65504].
inline uint16_t float16_above(float x) {
  const uint16_t half = float16_bits(x);
  return float16_value(half) < x ? static_cast<uint16_t>(half + 1) : half;
}

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

struct Range {
  float minimum;
  float inverse;  // 1 / scale, 0 for a constant part
};

// Chooses scale and minimum of `stride` values and writes the pair.
inline Range write_range(const float* values, int stride, float num_steps, uint8_t* pair) {
  F low = load(values);
  F high = low;
  for (int i = kWidth; i < stride; i += kWidth) {
    low = vmin(low, load(values + i));
    high = vmax(high, load(values + i));
  }
  // Adding 0 makes a zero positive.
  const uint16_t minimum_bits = float16_below(clamp(min_of(low), -65504.0F, 65504.0F) + 0.0F);
  const float minimum = float16_value(minimum_bits);
  const uint16_t scale_bits = float16_above(clamp((max_of(high) - minimum) / num_steps, 0.0F, 65504.0F) + 0.0F);
  const float scale = float16_value(scale_bits);
  std::memcpy(pair, &scale_bits, sizeof(scale_bits));
  std::memcpy(pair + 2, &minimum_bits, sizeof(minimum_bits));
  return {minimum, scale > 0.0F ? 1.0F / scale : 0.0F};
}

inline F codes(const float* values, const Range& range, float num_steps) {
  const F steps = (load(values) - set1(range.minimum)) * set1(range.inverse);
  return round_even(vmin(vmax(steps, set1(0.0F)), set1(num_steps)));
}

// One part of a head of K or V; `values` has part_stride floats of room.
inline void write_codes(const HalfLayout& layout, const uint8_t* source, Dtype dtype, float* values, uint8_t* part,
                        uint8_t* pair) {
  const int dim = layout.part_dim();
  const int plane = layout.plane_len();
  const int stride = layout.plane_stride();
  widen(dtype, source, dim, values);
  // Padding repeats a value: it changes neither minimum nor maximum.
  float* high = values + stride;
  if (layout.planes() > 1) {
    std::memmove(high, values + plane, static_cast<size_t>(dim - plane) * sizeof(float));
    for (int i = dim - plane; i < stride; ++i) high[i] = values[0];
  }
  for (int i = plane; i < stride; ++i) values[i] = values[0];
  const float num_steps = layout.dtype == Dtype::kInt8 ? 255.0F : 15.0F;
  const Range range = write_range(values, layout.part_stride(), num_steps, pair);
  // The code of an odd part's missing last value.
  if (layout.planes() > 1 && dim - plane < plane) high[plane - 1] = range.minimum;
  uint8_t vector[kWidth];
  for (int i = 0; i < plane; i += kWidth) {
    const F low_codes = codes(values + i, range, num_steps);
    if (layout.planes() > 1) {
      store_u4(vector, low_codes, codes(high + i, range, num_steps));
    } else {
      store_u8(vector, low_codes);
    }
    const int left = plane - i < kWidth ? plane - i : kWidth;
    std::memcpy(part + i, vector, static_cast<size_t>(left));
  }
}

inline void encode(const EncodeTask& task, int64_t first, int64_t last, float* scratch) {
  const RowLayout& layout = task.layout;
  const int part_dim = layout.keys().part_dim();
  const size_t part_values_bytes = static_cast<size_t>(part_dim) * value_bytes(task.dtype);
  for (int64_t token = first; token < last; ++token) {
    uint8_t* row = task.rows + static_cast<size_t>(task.slots[token]) * task.row_stride;
    if (layout.coded()) row[layout.pairs_at() - 1] = 0;  // the byte that fills up, where there is one
    for (int half = 0; half < 2; ++half) {
      const auto* source = static_cast<const uint8_t*>(half ? task.v : task.k);
      source += static_cast<size_t>(token) * (half ? task.v_stride : task.k_stride);
      const HalfLayout half_layout = half ? layout.values() : layout.keys();
      uint8_t* codes_at = row + (half ? layout.values_at() : 0);
      if (task.dtype == layout.dtype) {
        std::memcpy(codes_at, source, half_layout.bytes());
        continue;
      }
      for (int i = 0; i < layout.num_pairs(); ++i) {
        uint8_t* part = codes_at + i * half_layout.part_bytes();
        const uint8_t* values = source + i * part_values_bytes;
        if (layout.coded()) {
          uint8_t* pair = row + layout.pairs_at() + 4 * (static_cast<size_t>(half) * layout.num_pairs() + i);
          write_codes(half_layout, values, task.dtype, scratch, part, pair);
        } else {
          widen(task.dtype, values, part_dim, scratch);
          narrow(layout.dtype, scratch, part_dim, part);
        }
      }
    }
  }
}

}  // namespace alisa::ALISA_ISA
