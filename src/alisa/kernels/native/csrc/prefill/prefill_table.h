// The last lines of every prefill_*.cpp: the kernels of this instruction set as a table.
#pragma once

#include "prefill_attend.h"
#include "prefill_choice.h"
#include "prefill_mass.h"

namespace alisa::ALISA_ISA {

constexpr PrefillIsa prefill_table(const char* name) {
  return {name,        kTile, block_words, Scratch::words, pack,  attend, kMassTokens, MassScratch::words,
          mass,        means, ChoiceScratch::words, choose};
}

}  // namespace alisa::ALISA_ISA
