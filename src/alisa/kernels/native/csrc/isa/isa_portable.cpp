// The kernels for any CPU. CMakeLists.txt gives this file its own compiler flags.
#define ALISA_ISA portable
#include "vec_portable.h"
// The vectors come first.
#include "isa_table.h"

namespace alisa {

const Isa kPortable = portable::table("portable");

}  // namespace alisa
