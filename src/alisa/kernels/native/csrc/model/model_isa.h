// What each instruction set provides for the layers of a model: products, and what stands between them. As in isa.h, the same
// templates are compiled once for each.
#pragma once

#include "activation_task.h"
#include "matrix.h"

namespace alisa {

// RMS norm without a bias, layer norm with one; both compute in float32.
struct Norm {
  const float* weight;  // [count]; null: there is no norm
  const float* bias;
  int count;
  float eps;
};

// What a step's rotary embedding does to a head: value i becomes x[i] * cos[i] + x[i + half] * sin[i], around the end; the
// signs are in the sines.
struct RotationTable {
  const float* cos;  // [N, width]
  const float* sin;
  int width;  // values of a head that are turned; 0: none
};

// Sums [tokens, kLanes] of a tile, with scale and bias.
using Multiply = void (*)(const Matrix& matrix, const Inputs& inputs, const Tile& tile, float* sums);

struct ModelIsa {
  const char* name;
  // Rows of floats to and from another dtype.
  void (*widen)(Dtype dtype, const void* x, int count, float* out);
  void (*narrow)(Dtype dtype, const float* x, int count, void* out);
  // Floats as if they had been stored in a dtype.
  void (*round_to)(Dtype dtype, float* x, int count);
  // One token's inputs from group `group` on: `count` floats, padded to whole groups.
  void (*prepare)(WeightFormat format, const float* x, int count, int group, int64_t token, const Inputs& inputs);
  Multiply multiply[4];  // by format
  // `out` may be x.
  void (*norm)(const Norm& norm, Dtype dtype, const float* x, float* out);
  // x = round(x + round(y * scale)).
  void (*add)(Dtype dtype, const float* y, float scale, float* x, int count);
  // One head.
  void (*rotate)(Dtype dtype, const RotationTable& table, int64_t token, float* head);
  // x = round(act(x)); where there are `times`, x = round(x * times) after it.
  void (*activate)(Activation kind, Dtype dtype, float* x, const float* times, int count);
};

// Null where this build or this CPU lacks it.
const ModelIsa* find_model_isa(const char* name);

// Defined by the files compiled for one instruction set each.
extern const ModelIsa kModelPortable;
#ifdef ALISA_X86
extern const ModelIsa kModelAvx2;
extern const ModelIsa kModelVnni;
extern const Multiply kMultiplyBf16;
#endif

}  // namespace alisa
