// The kernels for AVX2 with FMA and F16C. CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA avx2
#include "vec_avx2.h"
// The vectors come first.
#include "isa_table.h"

namespace alisa {

const Isa kAvx2 = avx2::table("avx2");

}  // namespace alisa
