// The prefill kernels for AVX512-BF16. CMakeLists.txt gives this file its own compiler flags.
#include "prefill_attend.h"
#include "prefill_choice.h"
#include "prefill_mass.h"

namespace alisa::avx512_bf16 {

constexpr PrefillIsa prefill_table() {
  return {kTile, block_words, Scratch::words, pack,  attend, kMassTokens, MassScratch::words,
          mass,  means,       ChoiceScratch::words, choose};
}

}  // namespace alisa::avx512_bf16

namespace alisa {

const PrefillIsa kPrefillAvx512Bf16 = avx512_bf16::prefill_table();

}  // namespace alisa
