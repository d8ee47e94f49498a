// How the values of one head are read from a row, for each row dtype: `load` makes vector `index` of every plane, `tail`
// the last one, of which only `count` values exist (the bytes after them may belong to nobody).
//
// Included once per instruction set, after a vec_*.h.
#pragma once

#include <cstring>

#include "task.h"

namespace alisa::ALISA_ISA {

template <int kBytesPerValue, F (*kLoad)(const void*)>
struct OnePlane {
  static constexpr int kPlanes = 1;
  static inline void load(const uint8_t* head, int index, F* out) {
    out[0] = kLoad(head + static_cast<size_t>(index) * kWidth * kBytesPerValue);
  }
  static inline void tail(const uint8_t* head, int index, int count, F* out) {
    uint8_t padded[kWidth * kBytesPerValue] = {};
    std::memcpy(padded, head + static_cast<size_t>(index) * kWidth * kBytesPerValue,
                static_cast<size_t>(count) * kBytesPerValue);
    out[0] = kLoad(padded);
  }
};

inline F load_f32(const void* p) {
  float values[kWidth];
  std::memcpy(values, p, sizeof(values));
  return load(values);
}

struct Float32Row : OnePlane<4, load_f32> {
  static constexpr bool kCoded = false;
};
struct BFloat16Row : OnePlane<2, load_bf16> {
  static constexpr bool kCoded = false;
};
struct Float16Row : OnePlane<2, load_f16> {
  static constexpr bool kCoded = false;
};
struct Int8Row : OnePlane<1, load_u8> {
  static constexpr bool kCoded = true;
};
struct Int4Row {
  static constexpr bool kCoded = true;
  static constexpr int kPlanes = 2;
  static inline void load(const uint8_t* head, int index, F* out) {
    load_u4(head + static_cast<size_t>(index) * kWidth, out[0], out[1]);
  }
  static inline void tail(const uint8_t* head, int index, int count, F* out) {
    uint8_t padded[kWidth] = {};
    std::memcpy(padded, head + static_cast<size_t>(index) * kWidth, static_cast<size_t>(count));
    load_u4(padded, out[0], out[1]);
  }
};

// `count` floats of a float dtype into a float32 buffer.
template <class Row>
inline void widen_as(const uint8_t* source, int count, float* target) {
  const int whole = count / kWidth;
  F x[1];
  for (int i = 0; i < whole; ++i) {
    Row::load(source, i, x);
    store(target + i * kWidth, x[0]);
  }
  if (const int rest = count - whole * kWidth) {
    Row::tail(source, whole, rest, x);
    float padded[kWidth];
    store(padded, x[0]);
    std::memcpy(target + whole * kWidth, padded, static_cast<size_t>(rest) * sizeof(float));
  }
}

inline void widen(Dtype dtype, const uint8_t* source, int count, float* target) {
  if (dtype == Dtype::kBFloat16) return widen_as<BFloat16Row>(source, count, target);
  if (dtype == Dtype::kFloat16) return widen_as<Float16Row>(source, count, target);
  std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
}

template <void (*kStore)(void*, F)>
inline void narrow_by(const float* source, int count, uint8_t* target) {
  const int whole = count / kWidth;
  for (int i = 0; i < whole; ++i) kStore(target + static_cast<size_t>(i) * kWidth * 2, load(source + i * kWidth));
  if (const int rest = count - whole * kWidth) {
    float padded[kWidth] = {};
    uint8_t narrow[kWidth * 2];
    std::memcpy(padded, source + whole * kWidth, static_cast<size_t>(rest) * sizeof(float));
    kStore(narrow, load(padded));
    std::memcpy(target + static_cast<size_t>(whole) * kWidth * 2, narrow, static_cast<size_t>(rest) * 2);
  }
}

// `count` float32 values rounded to a float dtype, ties to even.
inline void narrow(Dtype dtype, const float* source, int count, uint8_t* target) {
  if (dtype == Dtype::kBFloat16) return narrow_by<store_bf16>(source, count, target);
  if (dtype == Dtype::kFloat16) return narrow_by<store_f16>(source, count, target);
  std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
}

ALISA_INLINE int value_bytes(Dtype float_dtype) { return float_dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace alisa::ALISA_ISA
