// The last lines of every model_*.cpp: the kernels of this instruction set as a table.
#pragma once

#include "model_isa.h"
#include "rows.h"
#include "tiles.h"

namespace alisa::ALISA_ISA {

constexpr ModelIsa model_table(const char* name) {
  return {name,
          widen_row,
          narrow_row,
          round_to,
          prepare,
          {multiply<Float32Weights>, multiply<BFloat16Weights>, multiply<Int8Weights>, multiply<Int4Weights>},
          norm,
          add_row,
          rotate,
          activate_row};
}

}  // namespace alisa::ALISA_ISA
