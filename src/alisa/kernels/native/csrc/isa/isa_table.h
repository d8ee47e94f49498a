// The last lines of every isa_*.cpp: the kernels of this instruction set as a table.
#pragma once

#include "activation.h"
#include "attend.h"
#include "encode.h"
#include "finish.h"
#include "isa.h"
#include "mean_value.h"
#include "rest.h"
#include "sketch_table.h"
#include "turn.h"

namespace alisa::ALISA_ISA {

inline size_t scratch_floats(const RowLayout& layout, int num_heads) {
  const size_t attending = AttendScratch::floats(layout, num_heads);
  const size_t finishing = FinishScratch::floats(layout, num_heads);
  return attending > finishing ? attending : finishing;
}

constexpr Isa table(const char* name) {
  return {name, scratch_floats, attend, finish, encode, sketch_kernels(), mean_floats, mean_add, mean_blend,
          rest_blend, activate, turn};
}

}  // namespace alisa::ALISA_ISA
