// The kernels for AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA avx512
#include "vec_avx512.h"
// The vectors come first.
#include "isa_table.h"

namespace alisa {

const Isa kAvx512 = avx512::table("avx512");

}  // namespace alisa
