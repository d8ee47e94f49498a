// Vectors of prefill kernels: AVX2, whose products are of float32. A word is one number, so that queries, keys and weights
// are not rounded on their way. The same names as in prefill_vec_avx512_bf16.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "prefill.h"

namespace alisa::ALISA_PREFILL {

constexpr int kLanes = 8;
constexpr int kWordValues = 1;
constexpr int kTogether = 2;  // vectors of sums of six rows: 6 x 2, 2 operands and a broadcast fill the 16 registers

constexpr float kLog2E = 1.44269504088896341F;

using F = __m256;
using Words = __m256;

ALISA_INLINE F zeros() { return _mm256_setzero_ps(); }
ALISA_INLINE F set1(float x) { return _mm256_set1_ps(x); }
ALISA_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
ALISA_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
ALISA_INLINE F plus(F a, F b) { return _mm256_add_ps(a, b); }
ALISA_INLINE F minus(F a, F b) { return _mm256_sub_ps(a, b); }
ALISA_INLINE F times(F a, F b) { return _mm256_mul_ps(a, b); }
ALISA_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
ALISA_INLINE F vmax(F a, F b) { return _mm256_max_ps(a, b); }
ALISA_INLINE float max_of(F x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
ALISA_INLINE float sum_of(F x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
ALISA_INLINE bool any_above(F x, F limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ)) != 0; }

// All bits of the first `count` lanes.
ALISA_INLINE F first_lanes(int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
}
// x in lanes [first, end), minus infinity elsewhere.
ALISA_INLINE F seen_only(F x, int first, int end) {
  return _mm256_blendv_ps(set1(-__builtin_inff()), x, _mm256_andnot_ps(first_lanes(first), first_lanes(end)));
}
// sum + x in the first `count` lanes.
ALISA_INLINE F add_first(F sum, F x, int count) { return plus(sum, _mm256_and_ps(x, first_lanes(count))); }
ALISA_INLINE void store_first(float* p, F x, int count) { _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(count)), x); }
ALISA_INLINE void store_first(uint16_t* p, F x, int count) {
  // To the nearest, to the even of two; a NaN stays one.
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  if (count >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  } else if (count > 0) {
    uint16_t values[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values), packed);
    std::memcpy(p, values, static_cast<size_t>(count) * sizeof(uint16_t));
  }
}
ALISA_INLINE F widened(const uint16_t* p) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}
// The first `count` of a run of bfloat16, and zeros.
ALISA_INLINE F load_first(const uint16_t* p, int count) {
  if (count >= kLanes) return widened(p);
  uint16_t values[kLanes] = {};
  if (count > 0) std::memcpy(values, p, static_cast<size_t>(count) * sizeof(uint16_t));
  return widened(values);
}

ALISA_INLINE Words load_words(const uint32_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
ALISA_INLINE Words repeat(const uint32_t& word) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word))); }
ALISA_INLINE F add_products(F sums, Words a, Words b) { return _mm256_fmadd_ps(a, b, sums); }

// As in prefill_vec_avx512_bf16.h, and 0 below 2^-126.
ALISA_INLINE F exp2_of(F x) {
  const F lowest = set1(-126.0F);
  const F inside = _mm256_max_ps(lowest, x);  // a NaN stays one
  const F floor = _mm256_floor_ps(inside);
  const F fraction = minus(inside, floor);
  F p = set1(0.0018775767F);
  p = fma(p, fraction, set1(0.00898934F));
  p = fma(p, fraction, set1(0.055826318F));
  p = fma(p, fraction, set1(0.24015361F));
  p = fma(p, fraction, set1(0.6931531F));
  p = fma(p, fraction, set1(0.99999994F));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127));
  const F power = times(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, lowest, _CMP_LT_OQ), power);
}

// cap * tanh(x / cap), for cap > 0.
ALISA_INLINE F cap_scores(F x, float cap) {
  const F sign = set1(-0.0F);
  const F one = set1(1.0F);
  const F faded = exp2_of(times(_mm256_andnot_ps(sign, x), set1(-2.0F * kLog2E / cap)));
  const F size = times(set1(cap), _mm256_div_ps(minus(one, faded), plus(one, faded)));
  return _mm256_or_ps(size, _mm256_and_ps(sign, x));
}

// A head of a query.
ALISA_INLINE void copy_query(const uint16_t* values, int head_dim, uint32_t* words) {
  for (int i = 0; i < head_dim; ++i) words[i] = static_cast<uint32_t>(values[i]) << 16;
}

// Weights on kUsed * kLanes keys.
template <int kUsed>
ALISA_INLINE void store_weights(const F (&x)[kUsed], uint32_t* words) {
  for (int i = 0; i < kUsed; ++i) store(reinterpret_cast<float*>(words) + i * kLanes, x[i]);
}

// Keys as [value][key], 0 after the last key.
inline void pack_keys(const Heads& k, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
  for (int key = 0; key < kKeyBlock; ++key) {
    if (key >= count) {
      for (int i = 0; i < head_dim; ++i) packed[i * kKeyBlock + key] = 0;
      continue;
    }
    const uint16_t* values = k.at(first + key, kv_head);
    for (int i = 0; i < head_dim; ++i) packed[i * kKeyBlock + key] = static_cast<uint32_t>(values[i]) << 16;
  }
}

// Values as [key][value], 0 after the last key and the last value.
inline void pack_values(const Heads& v, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
  const int width = round_up(head_dim, kPad);
  for (int key = 0; key < kKeyBlock; ++key) {
    for (int i = 0; i < width; i += kLanes) {
      const int left = key < count ? head_dim - i : 0;
      const F values = left > 0 ? load_first(v.at(first + key, kv_head) + i, left) : zeros();
      store(reinterpret_cast<float*>(packed) + key * width + i, values);
    }
  }
}

}  // namespace alisa::ALISA_PREFILL
