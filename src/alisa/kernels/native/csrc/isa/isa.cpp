// Chooses the instruction set when the program runs.
#include "isa.h"

#include <cstring>
#include <initializer_list>

#include "prefill.h"

namespace alisa {
namespace {

#ifdef ALISA_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The kernels of AVX-512, with others for sketches.
const Isa& avx512_vnni() {
  static const Isa isa = [] {
    Isa with_vnni = kAvx512;
    with_vnni.name = "avx512_vnni";
    with_vnni.sketch = kSketchVnni;
    return with_vnni;
  }();
  return isa;
}
#endif

}  // namespace

const Isa* find_isa(const char* name) {
#ifdef ALISA_X86
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512_vnni") == 0) {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") ? &avx512_vnni() : nullptr;
  }
  if (std::strcmp(name, kAvx512.name) == 0) return has_avx512() ? &kAvx512 : nullptr;
  if (std::strcmp(name, kAvx2.name) == 0) return has_avx2() ? &kAvx2 : nullptr;
#endif
  return std::strcmp(name, kPortable.name) == 0 ? &kPortable : nullptr;
}

const Isa* best_isa() {
  for (const char* name : {"avx512_vnni", "avx512", "avx2"}) {
    if (const Isa* isa = find_isa(name)) return isa;
  }
  return &kPortable;
}

const PrefillIsa* find_prefill([[maybe_unused]] const char* name) {
#ifdef ALISA_X86
  __builtin_cpu_init();
  if (std::strcmp(name, kPrefillAvx512Bf16.name) == 0) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") ? &kPrefillAvx512Bf16 : nullptr;
  }
  if (std::strcmp(name, kPrefillAvx2.name) == 0) return has_avx2() ? &kPrefillAvx2 : nullptr;
#endif
  return nullptr;
}

}  // namespace alisa
