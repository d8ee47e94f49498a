// What prefill kernels need beside vec_avx2.h, whose products are of float32. A word is one number: weights are not rounded on
// their way to the values. The same names as in prefill_vec_avx512_bf16.h.
#pragma once

#include <cstring>

#include "prefill.h"
#include "vec_avx2.h"

namespace alisa::ALISA_ISA {

constexpr int kWordValues = 1;
constexpr int kTogether = 2;  // vectors of sums of six rows: 6 x 2, 2 operands and a broadcast fill the 16 registers

using Operand = F;

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
ALISA_INLINE F add_first(F sum, F x, int count) { return sum + _mm256_and_ps(x, first_lanes(count)); }
ALISA_INLINE void store_first(float* p, F x, int count) { _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(count)), x); }
ALISA_INLINE void store_first(uint16_t* p, F x, int count) {
  if (count >= kWidth) return store_bf16(p, x);
  uint16_t values[kWidth];
  store_bf16(values, x);
  if (count > 0) std::memcpy(p, values, static_cast<size_t>(count) * sizeof(uint16_t));
}
// The first `count` of a run of bfloat16, and zeros.
ALISA_INLINE F load_first(const uint16_t* p, int count) {
  if (count >= kWidth) return load_bf16(p);
  uint16_t values[kWidth] = {};
  if (count > 0) std::memcpy(values, p, static_cast<size_t>(count) * sizeof(uint16_t));
  return load_bf16(values);
}

ALISA_INLINE Operand load_operand(const uint32_t* words) { return load(reinterpret_cast<const float*>(words)); }
ALISA_INLINE Operand repeat(uint32_t word) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word))); }
ALISA_INLINE F add_products(F sums, Operand a, Operand b) { return fma(a, b, sums); }

// Where 2^x is a normal number; a NaN stays one.
constexpr float kLowestPower = -126.0F;
ALISA_INLINE F normal_power(F x) { return vmax(set1(kLowestPower), x); }
ALISA_INLINE F above_floor(F x) { return normal_power(x) - _mm256_floor_ps(normal_power(x)); }
// p * 2^floor(x), 0 below 2^-126.
ALISA_INLINE F times_pow2_floor(F p, F x) {
  const F lost = _mm256_cmp_ps(x, set1(kLowestPower), _CMP_LT_OQ);
  return _mm256_andnot_ps(lost, times_pow2(p, _mm256_floor_ps(normal_power(x))));
}
ALISA_INLINE F magnitude(F x) { return _mm256_andnot_ps(set1(-0.0F), x); }
// A magnitude with the sign of x.
ALISA_INLINE F with_sign_of(F x, F size) { return _mm256_or_ps(size, _mm256_and_ps(set1(-0.0F), x)); }

// A head of a query.
ALISA_INLINE void copy_query(const uint16_t* values, int head_dim, uint32_t* words) {
  for (int i = 0; i < head_dim; ++i) words[i] = static_cast<uint32_t>(values[i]) << 16;
}

// Weights on kUsed * kWidth keys.
template <int kUsed>
ALISA_INLINE void store_weights(const F (&x)[kUsed], uint32_t* words) {
  for (int i = 0; i < kUsed; ++i) store(reinterpret_cast<float*>(words) + i * kWidth, x[i]);
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
    for (int i = 0; i < width; i += kWidth) {
      const int left = key < count ? head_dim - i : 0;
      const F values = left > 0 ? load_first(v.at(first + key, kv_head) + i, left) : set1(0.0F);
      store(reinterpret_cast<float*>(packed) + key * width + i, values);
    }
  }
}

}  // namespace alisa::ALISA_ISA
