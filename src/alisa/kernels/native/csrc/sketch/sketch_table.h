// The kernels of a sketch as a table, after a vec_*.h.
#pragma once

#include "isa.h"
#include "sketch.h"
#include "sketch_append.h"

namespace alisa::ALISA_ISA {

inline size_t sketch_floats(const SketchLayout& layout, int num_heads) {
  const size_t scoring = SketchScratch::floats(layout, num_heads);
  const size_t appending = sketch_append_floats(layout);
  return scoring > appending ? scoring : appending;
}

constexpr SketchKernels sketch_kernels() {
  return {sketch_floats,  SketchQuery::floats, sketch_prepare, sketch_scores, sketch_finish,
          sketch_merge,   sketch_normalise,    sketch_shares,  sketch_rest,   sketch_append};
}

}  // namespace alisa::ALISA_ISA
