// The layers of a model for AVX2. CMakeLists.txt gives this file its own compiler flags.
//
// One instruction multiplies bytes without a sign with bytes that have one, and adds up pairs in 16 bits, where it stops at
// the largest number. Pairs of 4-bit weights are far from it: those of a whole span fit, and are widened once. 8-bit weights
// lend their sign to the inputs: 2 * 127 * 127 fits, the next pair would not, so that every pair is widened.
#define ALISA_ISA avx2
#include "matrix.h"
#include "vec_avx2.h"

namespace alisa::ALISA_ISA {

using Ints = __m256i;
struct WeightQuads {
  __m256i signed_bytes, magnitudes;
};
using InputQuads = __m256i;
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

constexpr int32_t kWeightZero = 0;
inline WeightQuads weights_at(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i signed_bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  return {signed_bytes, _mm256_abs_epi8(signed_bytes)};
}
inline InputQuads inputs_at(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof(quad));
  return _mm256_set1_epi32(quad);
}
inline Ints add_quads(Ints sum, const WeightQuads& w, InputQuads x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitudes, _mm256_sign_epi8(x, w.signed_bytes));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Two numbers of 16 bits for each lane.
using NibbleSums = __m256i;
using NibbleQuads = __m256i;
static_assert(kSpan / 4 * 2 * 15 * 127 < 1 << 15, "the sums of a span fit");
inline NibbleSums no_nibbles() { return _mm256_setzero_si256(); }
template <int kHigh>
inline NibbleQuads nibbles_at(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_and_si256(kHigh ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}
inline NibbleSums add_nibbles(NibbleSums sums, NibbleQuads w, InputQuads x) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
  asm("" : "+x"(sums));  // or GCC adds up the products of both halves of an oct first, for which there are no registers
  return sums;
}
inline Ints whole(NibbleSums sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

}  // namespace alisa::ALISA_ISA

// The vectors come first.
#include "model_table.h"

namespace alisa {

const ModelIsa kModelAvx2 = avx2::model_table("avx2");

}  // namespace alisa
