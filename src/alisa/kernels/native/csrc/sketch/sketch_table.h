// The kernels of a sketch as a table, after a vec_*.h.
#pragma once

#include "isa.h"
#include "sketch.h"
#include "sketch_append.h"

namespace alisa::ALISA_ISA {

inline size_t sketch_floats(const SketchLayout& layout, int num_heads) {
  const size_t scoring = SketchScratch::floats(layout, num_heads);
  const size_t appending = sketch_append_floats(layout);
  const auto completing = static_cast<size_t>(8 * round_up(layout.head_dim, kPad));
  const size_t most = scoring > appending ? scoring : appending;
  return most > completing ? most : completing;
}

constexpr SketchKernels sketch_kernels() {
  return {sketch_floats,    SketchQuery::floats, sketch_prepare,  sketch_scores, sketch_finish,
          sketch_normalise, sketch_shares,       sketch_complete, sketch_rest,   sketch_append};
}

}  // namespace alisa::ALISA_ISA
