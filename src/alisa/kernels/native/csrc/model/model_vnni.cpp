// The layers of a model for AVX-512 with VNNI. CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA vnni
#include "vec_avx512.h"

namespace alisa::ALISA_ISA {

// Not __m512i, which GCC takes for eight numbers: it then holds every sum twice, and not all of them in registers.
using Ints = int32_t __attribute__((vector_size(64)));
using WeightQuads = __m512i;
using InputQuads = __m512i;
constexpr int kTileTokens = 6;
constexpr int kTileLanes = 64;

inline __m512i raw(Ints x) { return reinterpret_cast<__m512i>(x); }
inline Ints ints(__m512i x) { return reinterpret_cast<Ints>(x); }
inline Ints ints(int32_t x) { return ints(_mm512_set1_epi32(x)); }
inline Ints add(Ints a, Ints b) { return ints(_mm512_add_epi32(raw(a), raw(b))); }
inline Ints larger(Ints a, Ints b) { return ints(_mm512_max_epi32(raw(a), raw(b))); }
inline int32_t largest_of(Ints x) { return _mm512_reduce_max_epi32(raw(x)); }
inline int32_t total_of(Ints x) { return _mm512_reduce_add_epi32(raw(x)); }
inline Ints magnitude_bits(F x) { return ints(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff))); }
inline Ints to_ints(F x) { return ints(_mm512_cvtps_epi32(x)); }
inline F to_floats(Ints x) { return _mm512_cvtepi32_ps(raw(x)); }
inline F plus(F a, F b) { return _mm512_add_ps(a, b); }
inline F times(F a, F b) { return _mm512_mul_ps(a, b); }
inline void store_codes(int8_t* p, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(raw(x))); }

constexpr int32_t kWeightZero = 128;
inline WeightQuads weights_at(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline InputQuads inputs_at(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof(quad));
  return _mm512_set1_epi32(quad);
}
inline Ints add_quads(Ints sum, WeightQuads w, InputQuads x) { return ints(_mm512_dpbusd_epi32(raw(sum), w, x)); }

using NibbleSums = Ints;
using NibbleQuads = WeightQuads;
inline NibbleSums no_nibbles() { return ints(0); }
template <int kHigh>
inline NibbleQuads nibbles_at(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_and_si512(kHigh ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}
inline NibbleSums add_nibbles(NibbleSums sums, NibbleQuads w, InputQuads x) { return add_quads(sums, w, x); }
inline Ints whole(NibbleSums sums) { return sums; }

}  // namespace alisa::ALISA_ISA

// The vectors come first.
#include "model_table.h"

namespace alisa {

const ModelIsa kModelVnni = vnni::model_table("avx512_vnni");

}  // namespace alisa
