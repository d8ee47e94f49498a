// A strip: six rows (heads of tokens) against the 64 keys of a block, in vectors of AVX-512 with its bfloat16 products.
#pragma once

#include <immintrin.h>

#include "prefill.h"

namespace alisa::avx512_bf16 {

constexpr int kLanes = 16;
constexpr int kRows = 6;  // a strip: 6 x 4 sums, 4 operands and a broadcast fill the 32 registers
constexpr int kVectors = kKeyBlock / kLanes;
constexpr int kKeyPairs = kKeyBlock / 2;

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.69314718055994531F;

using F = __m512;

ALISA_INLINE F pair_products(F sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
ALISA_INLINE __m512i load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
ALISA_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFF : count <= 0 ? 0 : (1U << count) - 1U);
}

// 2^x to 1e-7, 0 for -inf: a polynomial in the fraction of x (minimax in relative error over [0, 1]), scaled by its floor.
ALISA_INLINE F exp2_of(F x) {
  const F fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = _mm512_set1_ps(0.0018775767F);
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.00898934F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.055826318F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.24015361F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.6931531F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.99999994F));
  return _mm512_scalef_ps(p, x);
}

// cap * tanh(x / cap), for cap > 0.
ALISA_INLINE F cap_scores(F x, float cap) {
  const F one = _mm512_set1_ps(1.0F);
  const F faded = exp2_of(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0F * kLog2E / cap)));
  const F size = _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_div_ps(_mm512_sub_ps(one, faded), _mm512_add_ps(one, faded)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_sub_ps(size, negative, _mm512_setzero_ps(), size);
}

// Products of a strip of queries with the first `kUsed` vectors of a packed block of keys.
template <int kUsed>
ALISA_INLINE void products(const uint32_t* q, const uint32_t* keys, int pairs, F (&scores)[kRows][kUsed]) {
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) scores[row][i] = _mm512_setzero_ps();
  }
  for (int pair = 0; pair < pairs; ++pair) {
    __m512i operand[kUsed];
    for (int i = 0; i < kUsed; ++i) operand[i] = load_words(keys + pair * kKeyBlock + i * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const __m512i query = _mm512_set1_epi32(static_cast<int>(q[row * pairs + pair]));
      for (int i = 0; i < kUsed; ++i) scores[row][i] = pair_products(scores[row][i], query, operand[i]);
    }
  }
}

}  // namespace alisa::avx512_bf16
