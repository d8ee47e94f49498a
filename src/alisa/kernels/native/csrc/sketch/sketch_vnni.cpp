// The sketch's kernels for AVX-512 with VNNI. CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA vnni
#include "vec_avx512.h"
// The vectors come first.
#include "sketch_table.h"

namespace alisa {

const SketchKernels kSketchVnni = vnni::sketch_kernels();

}  // namespace alisa
