// What mean_value.h and rest.h are asked to do; as task.h, included by files that are compiled for one instruction set.
#pragma once

#include "task.h"

namespace alisa {

// Values of new tokens added to the sums of their sequences.
struct MeanAddTask {
  double* sums;  // [sequences, G, D]
  int num_kv_heads;
  int head_dim;
  const void* values;  // [N, G, D]
  Dtype dtype;
  size_t stride;         // bytes from one token to the next
  const int64_t* req_index;  // [N]
  int64_t num_tokens;    // N
};

// Attention over a part of the tokens, and the mean of all values at the weight of the rest.
struct MeanBlendTask {
  const double* sums;  // [sequences, G, D]
  int num_kv_heads;
  int head_dim;
  int num_heads;
  const void* read;  // [B, H, D]
  void* out;         // [B, H, D]
  Dtype dtype;
  const float* shares;     // [B, H]
  const int64_t* req_index;    // [B]
  const int32_t* lengths;  // [B]
};

// Attention over a part of the tokens at its share of the weight, and what the others add.
struct RestBlendTask {
  int num_heads;
  int head_dim;
  const void* read;  // [B, H, D]
  void* out;         // [B, H, D]
  Dtype dtype;
  const float* shares;  // [B, H]
  const float* rest;    // [B, H, D]
};

}  // namespace alisa
