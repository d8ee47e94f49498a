// The prefill kernels for AVX512-BF16. CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA prefill_avx512_bf16
#include "prefill_vec_avx512_bf16.h"

// The vectors come first.
#include "prefill_table.h"

namespace alisa {

const PrefillIsa kPrefillAvx512Bf16 = prefill_avx512_bf16::prefill_table("avx512_bf16");

}  // namespace alisa
