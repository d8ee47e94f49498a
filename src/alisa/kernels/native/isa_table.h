// The last lines of every isa_*.cpp: the kernels of this instruction set as a table.
#pragma once

#include "attend.h"
#include "encode.h"
#include "finish.h"
#include "isa.h"
#include "mean_value.h"
#include "sketch.h"
#include "sketch_append.h"

namespace alisa::ALISA_ISA {

inline size_t scratch_floats(const RowLayout& layout, int num_heads) {
  const size_t attending = AttendScratch::floats(layout, num_heads);
  const size_t finishing = FinishScratch::floats(layout, num_heads);
  return attending > finishing ? attending : finishing;
}

inline size_t sketch_floats(const SketchLayout& layout, int num_heads) {
  const size_t scoring = SketchScratch::floats(layout, num_heads);
  const size_t appending = sketch_append_floats(layout);
  return scoring > appending ? scoring : appending;
}

constexpr Isa table(const char* name) {
  return {name, scratch_floats, attend, finish, encode, sketch_floats, sketch_scores, sketch_finish, sketch_shares, sketch_append,
          mean_floats, mean_add, mean_blend};
}

}  // namespace alisa::ALISA_ISA
