// What prefill kernels need beside vec_avx512.h: AVX-512 with its products of bfloat16 pairs. A word is a pair. The same names
// as in prefill_vec_avx2.h.
#pragma once

#include <cstring>

#include "prefill.h"
#include "vec_avx512.h"

namespace alisa::ALISA_ISA {

constexpr int kWordValues = 2;
constexpr int kTogether = 4;  // vectors of sums of six rows: 6 x 4, 4 operands and a broadcast fill the 32 registers

using Operand = __m512i;

ALISA_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= kWidth ? 0xFFFF : count <= 0 ? 0 : (1U << count) - 1U);
}

ALISA_INLINE bool any_above(F x, F limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ) != 0; }

// x in lanes [first, end), minus infinity elsewhere.
ALISA_INLINE F seen_only(F x, int first, int end) {
  const auto seen = static_cast<__mmask16>(first_lanes(end) & ~first_lanes(first));
  return _mm512_mask_mov_ps(set1(-__builtin_inff()), seen, x);
}
// sum + x in the first `count` lanes.
ALISA_INLINE F add_first(F sum, F x, int count) { return _mm512_mask_add_ps(sum, first_lanes(count), sum, x); }
ALISA_INLINE void store_first(float* p, F x, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
ALISA_INLINE void store_first(uint16_t* p, F x, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
}
// The first `count` of a run of bfloat16, and zeros.
ALISA_INLINE F load_first(const uint16_t* p, int count) {
  const __m256i values = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

ALISA_INLINE Operand load_operand(const uint32_t* words) { return _mm512_loadu_si512(words); }
ALISA_INLINE Operand repeat(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
ALISA_INLINE F add_products(F sums, Operand a, Operand b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }

ALISA_INLINE F above_floor(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// p * 2^floor(x).
ALISA_INLINE F times_pow2_floor(F p, F x) { return _mm512_scalef_ps(p, x); }
ALISA_INLINE F magnitude(F x) { return _mm512_abs_ps(x); }
// A magnitude with the sign of x.
ALISA_INLINE F with_sign_of(F x, F size) {
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_sub_ps(size, negative, _mm512_setzero_ps(), size);
}

// A head of a query.
ALISA_INLINE void copy_query(const uint16_t* values, int head_dim, uint32_t* words) {
  words[(head_dim + 1) / 2 - 1] = 0;
  std::memcpy(words, values, static_cast<size_t>(head_dim) * sizeof(uint16_t));
}

// Weights on kUsed * kWidth keys, rounded to what meets the values.
template <int kUsed>
ALISA_INLINE void store_weights(const F (&x)[kUsed], uint32_t* words) {
  for (int i = 0; i < kUsed; i += 2) {
    _mm512_storeu_si512(words + i * (kWidth / 2), (__m512i)_mm512_cvtne2ps_pbh(x[i + 1], x[i]));
  }
}

// Rows of 16 words become columns.
inline void transpose(__m512i (&x)[kWidth]) {
  __m512i y[kWidth];
  for (int i = 0; i < kWidth; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kWidth; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xEE);
    const __m512i low2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xEE);
    y[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  }
  for (int i = 0; i < kWidth; ++i) x[i] = y[i];
}

// Keys as [pair of values][key], 0 after the last key and the last value.
inline void pack_keys(const Heads& k, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
  const int pairs = (head_dim + 1) / 2;
  for (int key = 0; key < kKeyBlock; key += kWidth) {
    for (int pair = 0; pair < pairs; pair += kWidth) {
      const int left = head_dim - 2 * pair;
      const auto mask = static_cast<__mmask32>(left >= 2 * kWidth ? 0xFFFFFFFFU : (1U << left) - 1U);
      __m512i words[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        words[i] = key + i < count ? _mm512_maskz_loadu_epi16(mask, k.at(first + key + i, kv_head) + 2 * pair)
                                   : _mm512_setzero_si512();
      }
      transpose(words);
      const int columns = pairs - pair < kWidth ? pairs - pair : kWidth;
      for (int i = 0; i < columns; ++i) _mm512_storeu_si512(packed + (pair + i) * kKeyBlock + key, words[i]);
    }
  }
}

// Values as [pair of keys][value], 0 after the last key and the last value.
inline void pack_values(const Heads& v, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
  const int width = round_up(head_dim, kPad);
  for (int key = 0; key < kKeyBlock; key += 2) {
    for (int i = 0; i < width; i += kWidth) {
      const __mmask16 mask = first_lanes(head_dim - i);
      const __mmask16 even = key < count ? mask : 0;
      const __mmask16 odd = key + 1 < count ? mask : 0;
      const uint16_t* values = v.at(first + key, kv_head) + i;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, values));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, values + v.token_stride));
      _mm512_storeu_si512(packed + key / 2 * width + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

}  // namespace alisa::ALISA_ISA
