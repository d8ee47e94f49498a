// What each instruction set provides. The same templates are compiled once for each, with their own compiler flags, and
// the table to use is chosen when the program runs.
#pragma once

#include "activation_task.h"
#include "mean_task.h"
#include "task.h"
#include "turn_task.h"

namespace alisa {

// Of sketches of keys and values.
struct SketchKernels {
  // Floats of scratch that the others need.
  size_t (*floats)(const SketchLayout& layout, int num_heads);
  // Floats of a prepared query, a whole number of cache lines; and one sequence's, into the task's `queries`.
  size_t (*query_floats)(const SketchLayout& layout, int num_heads);
  void (*prepare)(const SketchTask& task, int seq, float* scratch);
  // One partial result.
  void (*scores)(const SketchTask& task, int item, float* scratch);
  // Merges the partial results of one sequence and writes its scores: the next, for all blocks.
  void (*finish)(const SketchTask& task, int seq, float* scratch);
  // The scores of some blocks of one sequence, all of whose partial results are there.
  void (*normalise)(const SketchTask& task, int seq, int first_block, int num_blocks, float* scratch);
  // The share of weight of what was then chosen.
  void (*shares)(const SketchTask& task, int seq, const int32_t* positions, size_t stride, int count, float* shares,
                 float* scratch);
  // What the tokens of one item add that were not chosen; `count` of each index set were. Then all items of one sequence, into
  // the task's `rest`.
  void (*complete)(const SketchTask& task, int item, const int32_t* positions, size_t stride, int count, float* scratch);
  void (*rest)(const SketchTask& task, int seq, int count, float* scratch);
  // Keys or values [first, last) into their sketch.
  void (*append)(const SketchAppendTask& task, int64_t first, int64_t last, float* scratch);
};

struct Isa {
  const char* name;
  // Floats of scratch that `attend`, `finish` and `encode` need; it begins at a whole cache line, as every buffer does.
  size_t (*scratch_floats)(const RowLayout& layout, int num_heads);
  // One partial result; `scratch` belongs to the calling thread.
  void (*attend)(const DecodeTask& task, int item, float* scratch);
  // Merges the partial results of one sequence and writes its output, mass and log-sum-exp.
  void (*finish)(const DecodeTask& task, int seq, float* scratch);
  // Tokens [first, last) into their rows.
  void (*encode)(const EncodeTask& task, int64_t first, int64_t last, float* scratch);

  SketchKernels sketch;

  // The mean of values: scratch floats, all tokens of a call added up, one sequence blended.
  size_t (*mean_floats)(int head_dim);
  void (*mean_add)(const MeanAddTask& task, float* scratch);
  void (*mean_blend)(const MeanBlendTask& task, int seq, float* scratch);
  // One sequence, with as much scratch.
  void (*rest_blend)(const RestBlendTask& task, int seq, float* scratch);

  // Tokens [first, last) of an MLP.
  void (*activate)(const ActivationTask& task, int64_t first, int64_t last);
  // Tokens [first, last), with the scratch that the task asks for.
  void (*turn)(const TurnTask& task, int64_t first, int64_t last, float* scratch);
};

// Null where this build or this CPU lacks it.
const Isa* find_isa(const char* name);
// The fastest one this CPU can run.
const Isa* best_isa();

// Defined by the files compiled for one instruction set each.
extern const Isa kPortable;
#ifdef ALISA_X86
extern const Isa kAvx2;
extern const Isa kAvx512;
extern const SketchKernels kSketchVnni;
#endif

}  // namespace alisa
