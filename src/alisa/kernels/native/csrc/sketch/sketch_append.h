// New keys or values as low-bit codes. `make_sketch` in alisa.kernels.reference.sketch is the same arithmetic in torch, bit for bit.
#pragma once

#include "elements.h"
#include "float16.h"
#include "task.h"

namespace alisa::ALISA_ISA {

inline size_t sketch_append_floats(const SketchLayout& layout) {
  return static_cast<size_t>(round_up(layout.planes() * layout.code_bytes() + kPad, kPad));
}

inline float within_float16(float x) { return x < -65504.0F ? -65504.0F : x > 65504.0F ? 65504.0F : x; }

// One head: `values` are its D numbers, with the room of `sketch_append_floats`.
inline void sketch_head(const SketchLayout& layout, float* values, uint8_t* codes, uint16_t* range) {
  const int dim = layout.head_dim;
  const int code_bytes = layout.code_bytes();
  const int end = layout.planes() * code_bytes + kWidth;
  // Padding repeats a value while the range is sought, and is then what code 0 stands for.
  for (int i = dim; i < round_up(dim, kWidth); ++i) values[i] = values[0];
  F low = load(values);
  F high = low;
  for (int i = kWidth; i < dim; i += kWidth) {
    low = vmin(low, load(values + i));
    high = vmax(high, load(values + i));
  }
  const float num_steps = static_cast<float>((1 << layout.bits) - 1);
  // Adding 0 makes a zero positive.
  range[1] = float16_bits(within_float16(min_of(low)) + 0.0F);
  const float minimum = float16_value(range[1]);
  const float reach = within_float16((max_of(high) - minimum) / num_steps);
  range[0] = float16_bits(reach > 0.0F ? reach : 0.0F);
  const float step = float16_value(range[0]);
  const float inverse = step > 0.0F ? 1.0F / step : 0.0F;
  for (int i = dim; i < end; ++i) values[i] = minimum;

  for (int i = 0; i < code_bytes; i += kWidth) {
    F byte = set1(0.0F);
    for (int plane = layout.planes() - 1; plane >= 0; --plane) {
      const F steps = (load(values + plane * code_bytes + i) - set1(minimum)) * set1(inverse);
      const F code = round_even(vmin(vmax(steps, set1(0.0F)), set1(num_steps)));
      byte = byte * set1(num_steps + 1.0F) + code;
    }
    uint8_t vector[kWidth];
    store_u8(vector, byte);
    const int left = code_bytes - i < kWidth ? code_bytes - i : kWidth;
    std::memcpy(codes + i, vector, static_cast<size_t>(left));
  }
}

// Tokens [first, last) to their places.
inline void sketch_append(const SketchAppendTask& task, int64_t first, int64_t last, float* scratch) {
  const SketchLayout& layout = task.layout;
  const size_t head_bytes = static_cast<size_t>(layout.head_dim) * value_bytes(task.dtype);
  for (int64_t token = first; token < last; ++token) {
    const uint8_t* keys = static_cast<const uint8_t*>(task.vectors) + static_cast<size_t>(token) * task.stride;
    const size_t place = static_cast<size_t>(task.ids[token]) * layout.num_kv_heads;
    for (int g = 0; g < layout.num_kv_heads; ++g) {
      widen(task.dtype, keys + g * head_bytes, layout.head_dim, scratch);
      sketch_head(layout, scratch, task.codes + (place + g) * layout.code_bytes(), task.ranges + (place + g) * 2);
    }
  }
}

}  // namespace alisa::ALISA_ISA
