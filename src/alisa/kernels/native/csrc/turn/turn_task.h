// What turn.h is asked to do; as task.h, included by files that are compiled for one instruction set.
#pragma once

#include "task.h"

namespace alisa {

// Heads of tokens, each multiplied with the matrix of its K/V head, less a vector.
struct TurnTask {
  const void* heads;  // [N, H, D]
  void* out;          // [N, H, D]
  Dtype dtype;
  size_t stride;  // bytes of `heads` from one token to the next
  int num_heads;  // H, a multiple of G
  int num_kv_heads;  // G
  int head_dim;      // D
  const float* matrices;  // [G, D, padded D]: a head is a row vector, multiplied from the left
  const float* shifts;    // [G, padded D]

  ALISA_INLINE constexpr int padded() const { return round_up(head_dim, kPad); }
  // Floats that a thread needs.
  ALISA_INLINE constexpr size_t floats() const { return 2 * static_cast<size_t>(padded()); }
};

}  // namespace alisa
