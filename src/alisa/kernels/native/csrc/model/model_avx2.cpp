// The layers of a model for AVX2. CMakeLists.txt gives this file its own compiler flags.
//
// Pairs of 16-bit numbers: the instruction that takes bytes would saturate.
#define ALISA_ISA avx2
#include "vec_avx2.h"

namespace alisa::ALISA_ISA {

using Ints = __m256i;
// The bytes of each quad, as its even and its odd ones.
struct WeightQuads {
  __m256i even, odd;
};
struct InputQuads {
  __m256i even, odd;
};
constexpr int kTileTokens = 4;
constexpr int kTileLanes = 16;

inline Ints ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline int32_t largest_of(Ints x) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
inline int32_t total_of(Ints x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
inline Ints magnitude_bits(F x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
inline Ints to_ints(F x) { return _mm256_cvtps_epi32(x); }
inline F to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline F plus(F a, F b) { return _mm256_add_ps(a, b); }
inline F times(F a, F b) { return _mm256_mul_ps(a, b); }
// The lowest byte of each number.
inline void store_codes(int8_t* p, Ints x) {
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(255));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

inline WeightQuads weights_at(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
template <int kHigh>
inline WeightQuads nibbles_at(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i mask = _mm256_set1_epi16(15);
  if constexpr (kHigh) return {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), _mm256_srli_epi16(bytes, 12)};
  return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 8), mask)};
}
inline InputQuads inputs_at(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof(quad));
  const __m256i bytes = _mm256_set1_epi32(quad);
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Ints add_quads(Ints sum, const WeightQuads& w, const InputQuads& x) {
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(w.even, x.even), _mm256_madd_epi16(w.odd, x.odd)));
}

}  // namespace alisa::ALISA_ISA

// The vectors come first.
#include "model_table.h"

namespace alisa {

const ModelIsa kModelAvx2 = avx2::model_table("avx2");

}  // namespace alisa
