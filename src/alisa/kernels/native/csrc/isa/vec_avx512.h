// Vectors of 16 floats: AVX-512 F, BW, DQ and VL. Every vec_*.h has the same names, so that the kernels are written once.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace alisa::ALISA_ISA {

using F = __m512;
constexpr int kWidth = 16;
constexpr int kSums = 16;  // accumulators that leave registers for the operands

inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F vmax(F a, F b) { return _mm512_max_ps(a, b); }
inline F vmin(F a, F b) { return _mm512_min_ps(a, b); }
inline float max_of(F x) { return _mm512_reduce_max_ps(x); }
inline float min_of(F x) { return _mm512_reduce_min_ps(x); }
inline float sum_of(F x) { return _mm512_reduce_add_ps(x); }
inline F round_even(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for integral n.
inline F times_pow2(F p, F n) { return _mm512_scalef_ps(p, n); }
// value where x >= limit, else 0.
inline F keep_from(F x, F limit, F value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), value);
}

// The sums of eight vectors: four to `first`, four to `second`.
inline void sum8(const F (&x)[8], float* first, float* second) {
  const auto two = [](F a, F b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto four = [&two](const F* y) {
    const __m512d low = _mm512_castps_pd(two(y[0], y[1]));
    const __m512d high = _mm512_castps_pd(two(y[2], y[3]));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  };
  const F low = four(x);
  const F high = four(x + 4);
  const F halves = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xEE));
  const F all = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xB1));
  _mm_storeu_ps(first, _mm512_castps512_ps128(all));
  _mm_storeu_ps(second, _mm512_extractf32x4_ps(all, 2));
}

inline F load_bf16(const void* p) {
  const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline F load_u8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
// 16 bytes: their low and their high halves.
inline void load_u4(const void* p, F& low, F& high) {
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  low = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
  high = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
}

inline void store_bf16(void* p, F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store_f16(void* p, F x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// x in [0, 255], integral.
inline void store_u8(void* p, F x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline void store_u4(void* p, F low, F high) {
  const __m512i both = _mm512_or_si512(_mm512_cvtps_epi32(low), _mm512_slli_epi32(_mm512_cvtps_epi32(high), 4));
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(both));
}

// 16 (first, second) pairs of float16.
inline void load_f16_pairs(const void* p, F& first, F& second) {
  const __m512i pairs = _mm512_loadu_si512(p);
  first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}

// 16 (first, second) pairs of bfloat16.
inline void load_bf16_pairs(const void* p, F& first, F& second) {
  const __m512i pairs = _mm512_loadu_si512(p);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000U))));
}

// Bytes of packed codes, one in each lane; of `count`, what lies after them is not touched and reads as 0.
using Codes = __m512i;
inline Codes load_codes(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Codes load_codes(const void* p, int count) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1U << count) - 1), p));
}
template <int kShift, int kMask>
inline F code_values(Codes x) {
  if constexpr (kMask == 3) {  // four bits choose, two codes: one shift for all of a byte
    if constexpr (kShift >= 4) x = _mm512_srli_epi32(x, 4);
    const __m512 low = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    const __m512 high = _mm512_setr_ps(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(x, kShift % 4 == 0 ? low : high);
  }
  if constexpr (kShift > 0) x = _mm512_srli_epi32(x, kShift);
  return _mm512_cvtepi32_ps(kMask == 255 >> kShift ? x : _mm512_and_si512(x, _mm512_set1_epi32(kMask)));
}

// Small whole numbers, for dot products of codes with a rounded query: exact, so that no order shows.
using Word = int16_t;
using Words = __m512i;
using Sums = __m512i;
constexpr int kTokens = 4;  // in a vector with 16 bytes of each, as eight words

inline Words join(__m128i a, __m128i b, __m128i c, __m128i d) {
  const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(low, c, 2), d, 3);
}
// Of every fourth token, `stride` bytes apart.
inline Words load_pieces(const uint8_t* token, size_t stride) {
  const auto at = [&](size_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(token + i * stride)); };
  return join(at(0), at(1), at(2), at(3));
}
// Of `count` bytes; what lies after them is not touched and reads as 0.
inline Words load_pieces(const uint8_t* token, size_t stride, int count) {
  const auto mask = static_cast<__mmask16>((1U << count) - 1);
  const auto at = [&](size_t i) { return _mm_maskz_loadu_epi8(mask, token + i * stride); };
  return join(at(0), at(1), at(2), at(3));
}
// Eight words for every token.
inline Words repeat(const Word* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int kShift, int kMask>
inline Words bits_of(Words x) {
  if constexpr (kShift > 0) x = _mm512_srli_epi16(x, kShift);
  return kMask == 65535 >> kShift ? x : _mm512_and_si512(x, _mm512_set1_epi16(kMask));
}
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums add_products(Sums sums, Words a, Words b) {
#ifdef __AVX512VNNI__
  return _mm512_dpwssd_epi32(sums, a, b);
#else
  return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}
// The sums of kWidth tokens, each of them the four numbers of a token: those of token 4 * i + v are in x[v].
inline F token_sums(const Sums (&x)[4]) {
  const auto two = [](Sums a, Sums b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
  const Sums low = two(x[0], x[1]);
  const Sums high = two(x[2], x[3]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high)));
}

}  // namespace alisa::ALISA_ISA
