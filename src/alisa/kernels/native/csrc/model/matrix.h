// The weights of linear layers, in the order in which products read them, and the inputs of a product in the form that the
// weights ask for.
//
// Output channels lie in panels of kLanes, which a call reads from front to back, and inputs in groups of kGroup:
//
//   float32    [panels, inputs, kLanes]       sums are made input by input, rounded once each
//   bfloat16   [panels, pairs, kLanes, 2]     the same, in float32
//   int8       [panels, quads, kLanes, 4]     weight = scale * (code - 128), a scale for each output channel
//   int4       [panels, octs, kLanes, 4]      weight = minimum + scale * code for each output channel and kSpan inputs;
//                                             byte i of an oct holds the codes of inputs i (low) and i + 4
//
// The inputs of integer weights are rounded to signed 8 bits when they come, each group in steps of its own (a model has
// inputs a hundred times as large as the others: they must not coarsen all of a token). Sums within a group (int8) or a span
// (int4) are whole numbers and exact, and are then added up in float32, in order. So an output depends on its token alone,
// whatever the other tokens, the panels or the threads; with integer weights on no instruction set either.
// `alisa.model.linear_int8` and `linear_int4` have the same arithmetic in torch.
#pragma once

#include "task.h"

namespace alisa {

enum class WeightFormat : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

// Inputs that share a step.
constexpr int kGroup = 64;
// Inputs of 4-bit weights that share a scale and a minimum.
constexpr int kSpan = 32;
// Output channels that lie together.
constexpr int kLanes = 64;
// What every format has for each output channel and step of reading: one float, a pair, a quad, an oct.
constexpr int kStepBytes = 4;
// Output channels that threads share out: 16 floats are a cache line.
constexpr int kLaneUnit = 16;

struct Matrix {
  WeightFormat format;
  const uint8_t* codes;
  const float* scales;     // int8: [num_out]
  const uint16_t* ranges;  // int4: [panels, spans, 2, kLanes] in float16: scales, then minima
  const float* bias;       // [num_out] or null
  int num_in;
  int num_out;
  // Runs of output channels that begin with a panel of their own: 2 for the gate and the other half of a gated MLP.
  int parts;

  ALISA_INLINE constexpr int inputs_per_step() const {
    switch (format) {
      case WeightFormat::kFloat32: return 1;
      case WeightFormat::kBFloat16: return 2;
      case WeightFormat::kInt8: return 4;
      default: return 8;
    }
  }
  ALISA_INLINE constexpr bool whole_numbers() const { return format == WeightFormat::kInt8 || format == WeightFormat::kInt4; }
  ALISA_INLINE constexpr int groups() const { return (num_in + kGroup - 1) / kGroup; }
  ALISA_INLINE constexpr int spans() const { return (num_in + kSpan - 1) / kSpan; }
  ALISA_INLINE constexpr int steps() const {
    const int inputs = format == WeightFormat::kInt4 ? spans() * kSpan : num_in;
    return (inputs + inputs_per_step() - 1) / inputs_per_step();
  }
  ALISA_INLINE constexpr size_t panel_bytes() const { return static_cast<size_t>(steps()) * kLanes * kStepBytes; }
  ALISA_INLINE constexpr int part_rows() const { return num_out / parts; }
  ALISA_INLINE constexpr int part_panels() const { return (part_rows() + kLanes - 1) / kLanes; }
  ALISA_INLINE constexpr int panels() const { return parts * part_panels(); }
  // The first output channel of a panel, and how many it has.
  ALISA_INLINE constexpr int first_row(int panel) const {
    return panel / part_panels() * part_rows() + panel % part_panels() * kLanes;
  }
  ALISA_INLINE constexpr int num_rows(int panel) const {
    const int left = part_rows() - panel % part_panels() * kLanes;
    return left < kLanes ? left : kLanes;
  }
};

// The inputs of some tokens, group by group: a block of tokens and a group lie together.
struct Inputs {
  void* values;   // [groups, M, kGroup] in float32, bfloat16 or, as codes, int8
  float* steps;   // [groups, M]: of codes
  int32_t* sums;  // [groups, M, 2]: of the codes of each span
  int64_t num_tokens;  // M

  ALISA_INLINE size_t place(int group, int64_t token) const {
    return static_cast<size_t>(group) * static_cast<size_t>(num_tokens) + static_cast<size_t>(token);
  }
};

ALISA_INLINE constexpr size_t input_bytes(WeightFormat format) {
  return format == WeightFormat::kFloat32 ? 4 : format == WeightFormat::kBFloat16 ? 2 : 1;
}

// Tokens whose sums, and their inputs and the weights of one group, stay in L1.
ALISA_INLINE constexpr int block_tokens(WeightFormat format) { return format == WeightFormat::kFloat32 ? 48 : 96; }
constexpr int kMostBlockTokens = 96;

// Part of a product: lanes [first_lane, end_lane) of a panel, multiples of kLaneUnit, for tokens [first, last), at most a
// block of them.
struct Tile {
  int panel;
  int first_lane;
  int end_lane;
  int64_t first;
  int64_t last;
};

}  // namespace alisa
