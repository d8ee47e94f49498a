// Products with bfloat16 weights where one instruction adds up pairs (AVX-512 BF16); all else is model_vnni.cpp's.
// CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA avx512_bf16
#define ALISA_BF16_ONLY
#include "vec_avx512.h"

namespace alisa::ALISA_ISA {

constexpr int kTileTokens = 6;
constexpr int kTileLanes = 64;

}  // namespace alisa::ALISA_ISA

// The vectors come first.
#include "model_isa.h"
#include "tiles.h"

namespace alisa {
namespace avx512_bf16 {

struct PairedWeights {
  static constexpr WeightFormat kFormat = WeightFormat::kBFloat16;
  static constexpr int kInputs = 2;
  static constexpr int kBytes = 2;
  using Weights = __m512i;
  using Inputs = __m512i;
  static ALISA_INLINE Weights weights_at(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static ALISA_INLINE Inputs inputs_at(const uint8_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static ALISA_INLINE F add(F sum, Weights w, Inputs x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  template <int kTokens, int kVectors>
  static ALISA_INLINE void tile(const TileTask& task, Ahead ahead) {
    float_tile<PairedWeights, kTokens, kVectors>(task, ahead);
  }
};

}  // namespace avx512_bf16

const Multiply kMultiplyBf16 = avx512_bf16::multiply<avx512_bf16::PairedWeights>;

}  // namespace alisa
