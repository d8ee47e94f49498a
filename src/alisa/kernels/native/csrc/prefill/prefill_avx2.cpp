// The prefill kernels for AVX2. CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA prefill_avx2
#include "prefill_vec_avx2.h"

// The vectors come first.
#include "prefill_table.h"

namespace alisa {

const PrefillIsa kPrefillAvx2 = prefill_avx2::prefill_table("avx2");

}  // namespace alisa
