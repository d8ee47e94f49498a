// Products of floats with weights in 8 bits.
//
// The weight of an output channel is scale * (code - 128). A token's inputs are rounded to signed 8 bits when they come,
// each run of kGroup inputs in steps of its own (a model has inputs a hundred times as large as the others: they must not
// coarsen all of a token). Sums within a group are whole numbers and exact; they are then added up as
//
//   sum += step * float(sum of the group)      group by group, rounded twice
//   out  = sum * scale + bias
//
// for every output in the same order: neither the instruction set nor the other tokens of a call change a bit of it.
// `multiply_int8` in alisa.model.linear_int8 is the same arithmetic in torch.
#pragma once

#include "task.h"

namespace alisa {

// Inputs that share a step.
constexpr int kGroup = 64;
// Output channels that lie together, and inputs that one instruction adds up.
constexpr int kLanes = 64;
constexpr int kQuad = 4;
// Tokens whose sums stay in L1 next to a group of a panel (24 KB and 4 KB).
constexpr int kBlockTokens = 96;

struct ProductTask {
  const void* x;    // [M, num_in]
  Dtype dtype;      // of x and out
  size_t x_stride;  // bytes from one token to the next
  const uint8_t* codes;  // [ceil(num_out / kLanes), ceil(num_in / kQuad), kLanes, kQuad]; padding is 128
  const float* scales;   // [num_out]
  const float* bias;     // [num_out] or null
  void* out;             // [M, num_out]
  int64_t num_tokens;    // M
  int num_in;
  int num_out;

  // The inputs in 8 bits, group by group: buffers of product.cpp.
  int8_t* x_codes;  // [groups, M, kGroup]
  float* steps;     // [groups, M]
  int32_t* starts;  // [groups, M]: -128 times the sum of the codes

  ALISA_INLINE constexpr int groups() const { return (num_in + kGroup - 1) / kGroup; }
  ALISA_INLINE constexpr int quads() const { return (num_in + kQuad - 1) / kQuad; }
  ALISA_INLINE constexpr int panels() const { return (num_out + kLanes - 1) / kLanes; }
  ALISA_INLINE constexpr size_t panel_bytes() const { return static_cast<size_t>(quads()) * kLanes * kQuad; }
};

// What each instruction set provides.
struct ProductIsa {
  const char* name;
  // Tokens [first, last) in 8 bits.
  void (*quantise)(const ProductTask& task, int64_t first, int64_t last);
  // One panel of the output for tokens [first, last), at most kBlockTokens; `sums` has kBlockTokens * kLanes floats.
  void (*multiply)(const ProductTask& task, int panel, int64_t first, int64_t last, float* sums);
};

// Null where this build or this CPU lacks it.
const ProductIsa* find_product_isa(const char* name);

// Defined by the files compiled for one instruction set each.
extern const ProductIsa kProductPortable;
#ifdef ALISA_X86
extern const ProductIsa kProductAvx2;
extern const ProductIsa kProductVnni;
#endif

}  // namespace alisa
