// Vectors of 4 floats in the compiler's own vector types (GCC and Clang): SSE2 on x86, NEON on aarch64. The same names as
// in vec_avx512.h, and two intrinsics: the language cannot ask for NEON's fused multiply-add, nor for products of words on SSE2,
// which has none of 32 bits.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "float16.h"

namespace alisa::ALISA_ISA {

using F = float __attribute__((vector_size(16)));
using I = int32_t __attribute__((vector_size(16)));
using U = uint32_t __attribute__((vector_size(16)));
using U16 = uint16_t __attribute__((vector_size(8)));
using U8 = uint8_t __attribute__((vector_size(4)));
constexpr int kWidth = 4;
constexpr int kSums = 8;  // accumulators that leave registers for the operands

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}
template <class V>
inline V read(const void* p) {
  V out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

inline F set1(float x) { return F{x, x, x, x}; }
inline F load(const float* p) { return read<F>(p); }
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
#if defined(__aarch64__)
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
#else
// Rounds twice: the oldest x86 has no fused multiply-add.
inline F fma(F a, F b, F c) { return a * b + c; }
#endif
inline F vmax(F a, F b) { return a > b ? a : b; }
inline F vmin(F a, F b) { return a < b ? a : b; }
inline float max_of(F x) {
  float best = x[0];
  for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
inline float min_of(F x) { return -max_of(-x); }
inline float sum_of(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits after the point.
inline F round_even(F x) {
  const F magic = set1(12582912.0F);
  return (x + magic) - magic;
}
// p * 2^n for integral n in [-126, 127].
inline F times_pow2(F p, F n) {
  const I exponent = __builtin_convertvector(n, I) + 127;
  return p * bits<F>(exponent << 23);
}
// value where x >= limit, else 0.
inline F keep_from(F x, F limit, F value) { return x >= limit ? value : set1(0.0F); }

// The sums of eight vectors: four to `first`, four to `second`.
inline void sum8(const F (&x)[8], float* first, float* second) {
  for (int i = 0; i < 4; ++i) {
    first[i] = sum_of(x[i]);
    second[i] = sum_of(x[i + 4]);
  }
}

inline F load_bf16(const void* p) { return bits<F>(__builtin_convertvector(read<U16>(p), U) << 16); }
// The float16 values whose bits these are.
inline F from_f16(U half) {
  // Exponent and mantissa moved into place and the bias mended by a multiplication, which also makes subnormals right.
  const F magnitude = bits<F>((half & 0x7fffU) << 13) * set1(0x1p112F);
  const U infinite = bits<U>(bits<I>(half & 0x7fffU) >= 0x7c00) & 0x7f800000U;
  return bits<F>(bits<U>(magnitude) | infinite | ((half & 0x8000U) << 16));
}
inline F load_f16(const void* p) { return from_f16(__builtin_convertvector(read<U16>(p), U)); }
inline F load_u8(const void* p) { return __builtin_convertvector(__builtin_convertvector(read<U8>(p), I), F); }
// 4 bytes: their low and their high halves.
inline void load_u4(const void* p, F& low, F& high) {
  const I both = __builtin_convertvector(read<U8>(p), I);
  low = __builtin_convertvector(both & 15, F);
  high = __builtin_convertvector(both >> 4, F);
}

inline void store_bf16(void* p, F x) {
  const U raw = bits<U>(x);
  const U rounded = raw + (((raw >> 16) & 1U) + 0x7fffU);
  const I number = x == x;
  const U chosen = (rounded & bits<U>(number)) | (~bits<U>(number) & 0x7fc00000U);
  const U16 words = __builtin_convertvector(chosen >> 16, U16);
  std::memcpy(p, &words, sizeof(words));
}
inline void store_f16(void* p, F x) {
  uint16_t words[kWidth];
  for (int i = 0; i < kWidth; ++i) words[i] = float16_bits(x[i]);
  std::memcpy(p, words, sizeof(words));
}
inline void store_bytes(void* p, I x) {
  const U8 narrow = __builtin_convertvector(x, U8);
  std::memcpy(p, &narrow, sizeof(narrow));
}
// x in [0, 255], integral.
inline void store_u8(void* p, F x) { store_bytes(p, __builtin_convertvector(x, I)); }
inline void store_u4(void* p, F low, F high) {
  store_bytes(p, __builtin_convertvector(low, I) | (__builtin_convertvector(high, I) << 4));
}

// 4 (first, second) pairs of float16.
inline void load_f16_pairs(const void* p, F& first, F& second) {
  const U pairs = read<U>(p);
  first = from_f16(pairs & 0xffffU);
  second = from_f16(pairs >> 16);
}

// 4 (first, second) pairs of bfloat16.
inline void load_bf16_pairs(const void* p, F& first, F& second) {
  const U pairs = read<U>(p);
  first = bits<F>(pairs << 16);
  second = bits<F>(pairs & 0xffff0000U);
}

// Bytes of packed codes, one in each lane; of `count`, what lies after them is not touched and reads as 0.
using Codes = I;
inline Codes load_codes(const void* p) { return __builtin_convertvector(read<U8>(p), I); }
inline Codes load_codes(const void* p, int count) {
  uint8_t padded[kWidth] = {};
  std::memcpy(padded, p, static_cast<size_t>(count));
  return load_codes(padded);
}
template <int kShift, int kMask>
inline F code_values(Codes x) {
  return __builtin_convertvector((x >> kShift) & kMask, F);
}

// See vec_avx512.h.
using Word = int16_t;
using Words = uint16_t __attribute__((vector_size(16)));
using Sums = I;
constexpr int kTokens = 1;

inline Words load_pieces(const uint8_t* token, size_t) { return read<Words>(token); }
inline Words load_pieces(const uint8_t* token, size_t, int count) {
  uint8_t padded[16] = {};
  std::memcpy(padded, token, static_cast<size_t>(count));
  return read<Words>(padded);
}
inline Words repeat(const Word* p) { return read<Words>(p); }
template <int kShift, int kMask>
inline Words bits_of(Words x) {
  return (x >> kShift) & static_cast<uint16_t>(kMask);
}
inline Sums no_sums() { return I{}; }
inline Sums add_products(Sums sums, Words a, Words b) {
#if defined(__SSE2__)
  return sums + bits<I>(_mm_madd_epi16(bits<__m128i>(a), bits<__m128i>(b)));
#else
  using Half = int16_t __attribute__((vector_size(8)));
  Half of_a[2], of_b[2];
  std::memcpy(of_a, &a, sizeof(a));
  std::memcpy(of_b, &b, sizeof(b));
  for (int i = 0; i < 2; ++i) sums += __builtin_convertvector(of_a[i], I) * __builtin_convertvector(of_b[i], I);
  return sums;
#endif
}
inline F token_sums(const Sums (&x)[4]) {
  Sums out;
  for (int i = 0; i < 4; ++i) out[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
  return __builtin_convertvector(out, F);
}

}  // namespace alisa::ALISA_ISA
