// Vectors of 8 floats: AVX2, FMA and F16C. The same names as in vec_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace alisa::ALISA_ISA {

using F = __m256;
constexpr int kWidth = 8;
constexpr int kSums = 8;  // accumulators that leave registers for the operands

inline F set1(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F vmax(F a, F b) { return _mm256_max_ps(a, b); }
inline F vmin(F a, F b) { return _mm256_min_ps(a, b); }

inline float max_of(F x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float min_of(F x) { return -max_of(_mm256_sub_ps(_mm256_setzero_ps(), x)); }
inline float sum_of(F x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline F round_even(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for integral n in [-126, 127].
inline F times_pow2(F p, F n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
// value where x >= limit, else 0.
inline F keep_from(F x, F limit, F value) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ), value); }

// The sums of eight vectors: four to `first`, four to `second`.
inline void sum8(const F (&x)[8], float* first, float* second) {
  const auto four = [](const F* y, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  };
  four(x, first);
  four(x + 4, second);
}

inline F load_bf16(const void* p) {
  const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline F load_u8(const void* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
// 8 bytes: their low and their high halves.
inline void load_u4(const void* p, F& low, F& high) {
  const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
  high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
}

// The low 16 bits of each value.
inline __m128i narrow16(__m256i x) {
  const __m256i packed = _mm256_packus_epi32(x, x);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store_bf16(void* p, F x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128(static_cast<__m128i*>(p), narrow16(_mm256_srli_epi32(_mm256_castps_si256(chosen), 16)));
}
inline void store_f16(void* p, F x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bytes(void* p, __m256i x) {
  const __m128i words = narrow16(x);
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
// x in [0, 255], integral.
inline void store_u8(void* p, F x) { store_bytes(p, _mm256_cvtps_epi32(x)); }
inline void store_u4(void* p, F low, F high) {
  store_bytes(p, _mm256_or_si256(_mm256_cvtps_epi32(low), _mm256_slli_epi32(_mm256_cvtps_epi32(high), 4)));
}

// 8 (first, second) pairs of float16.
inline void load_f16_pairs(const void* p, F& first, F& second) {
  const __m256i pairs = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  first = _mm256_cvtph_ps(narrow16(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff))));
  second = _mm256_cvtph_ps(narrow16(_mm256_srli_epi32(pairs, 16)));
}

// 8 (first, second) pairs of bfloat16.
inline void load_bf16_pairs(const void* p, F& first, F& second) {
  const __m256i pairs = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000U))));
}

// Bytes of packed codes, one in each lane; of `count`, what lies after them is not touched and reads as 0.
using Codes = __m256i;
inline Codes load_codes(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline Codes load_codes(const void* p, int count) {
  uint8_t padded[kWidth] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(count));
  return load_codes(padded);
}
template <int kShift, int kMask>
inline F code_values(Codes x) {
  if constexpr (kShift > 0) x = _mm256_srli_epi32(x, kShift);
  return _mm256_cvtepi32_ps(kMask == 255 >> kShift ? x : _mm256_and_si256(x, _mm256_set1_epi32(kMask)));
}

// See vec_avx512.h.
using Word = int16_t;
using Words = __m256i;
using Sums = __m256i;
constexpr int kTokens = 2;

inline __m128i load_piece(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Words load_pieces(const uint8_t* token, size_t stride) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_piece(token)), load_piece(token + stride), 1);
}
inline Words load_pieces(const uint8_t* token, size_t stride, int count) {
  uint8_t padded[kTokens][16] = {};
  for (int i = 0; i < kTokens; ++i) __builtin_memcpy(padded[i], token + static_cast<size_t>(i) * stride, static_cast<size_t>(count));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded));
}
inline Words repeat(const Word* p) { return _mm256_broadcastsi128_si256(load_piece(p)); }
template <int kShift, int kMask>
inline Words bits_of(Words x) {
  if constexpr (kShift > 0) x = _mm256_srli_epi16(x, kShift);
  return kMask == 65535 >> kShift ? x : _mm256_and_si256(x, _mm256_set1_epi16(kMask));
}
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Sums add_products(Sums sums, Words a, Words b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
inline F token_sums(const Sums (&x)[4]) {
  return _mm256_cvtepi32_ps(_mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3])));
}

}  // namespace alisa::ALISA_ISA
