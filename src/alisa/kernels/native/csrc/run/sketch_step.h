// What a layer does in a decode step that reads by a sketch, in one call on one team of threads:
//
//   new tokens as rows and codes | scores of all tokens | the best of them | attention over these | the others by their codes
//
// The work is cut into units as it is in the single calls (workspace.h), with the same results to the last bit. Units of all
// sequences stand in one line, from which whoever is free takes the next. A unit waits for those that it needs, all of which
// come before it: no thread waits for one that waits itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "isa.h"
#include "layer_attention.h"
#include "plan.h"
#include "select.h"
#include "threads.h"

namespace alisa {

// Where a layer's rows and codes are.
struct SketchLayer {
  uint8_t* rows;
  uint8_t* key_codes;
  uint16_t* key_ranges;
  uint8_t* value_codes;
  uint16_t* value_ranges;
};

// The new tokens of a layer.
struct NewTokens {
  const void* q;  // [B, H, D]
  const void* k;  // [B, G, D]
  const void* v;
  size_t k_stride;  // bytes from one token to the next
  size_t v_stride;
};

// What is the same in all layers of a step. Pointers are the caller's.
struct SketchStepTask {
  SketchTask sketch;          // without q, codes and ranges; it completes
  DecodeTask attend;          // without q and rows; slots are written here, mass is null
  SelectTask<float> chosen;   // without scores
  int32_t* slots;             // [B, J, K], those of `attend`
  const int64_t* new_slots;   // [B]: where the rows of the new tokens go
  const int64_t* new_ids;     // [B]: where their codes go
  const int32_t* table;       // [sequences, table_stride]: the slots of their positions
  size_t table_stride;
  const int64_t* table_rows;  // [B]: of each new token's sequence; null: its own
  float* shares;              // [B, H]
  void* out;                  // [B, H, D]
};

class SketchStep {
 public:
  // Cuts the work into units; positions and slots of the recent tokens are written.
  SketchStep(const Isa& isa, const SketchStepTask& task);
  const void* out() const { return task_.out; }

 private:
  friend class SketchStepper;

  enum class Work { kAppend, kScore, kNormalise, kSelect, kAttend, kComplete };
  struct Unit {
    Work work;
    int seq;
    int index;     // of a new token or an item
    bool selects;  // it reads tokens that must have been chosen
  };

  void add_reading(int seq);
  void find_slots(int row, int first, int last) const;

  const Isa& isa_;
  SketchStepTask task_;
  Plan sketch_plan_;
  Plan attend_plan_;
  std::vector<Item> sketch_items_;
  std::vector<Item> attend_items_;
  std::vector<int> first_sketch_item_;  // [B + 1]
  std::vector<int> first_attend_item_;  // [B + 1]
  std::vector<Unit> units_;
  bool is_small_;
};

// Which part of a time went into choosing, and into the tokens that were not chosen.
struct Spent {
  int64_t choosing;
  int64_t reading;
  double chose() const { return static_cast<double>(choosing) / std::max(static_cast<double>(choosing + reading), 1.0); }
};

// Memory and counters of such steps. One call at a time; a second caller waits.
class SketchStepper {
 public:
  // Returns how its time, in nanoseconds of all threads, was spent.
  Spent run(const SketchStep& step, const SketchLayer& layer, const NewTokens& tokens, const Threads& threads);

 private:
  // Units of a sequence that are still to be done.
  struct Open {
    std::atomic<int> scores, weights, choice, reads;
  };
  struct Tasks {
    EncodeTask rows;
    SketchAppendTask keys, values;
    SketchTask sketch;
    DecodeTask attend;
  };

  void open(const SketchStep& step);
  void do_unit(const SketchStep& step, const SketchStep::Unit& unit, const Tasks& tasks, SelectMemory& selecting, float* mine);
  void choose(const SketchStep& step, int seq, const SketchTask& sketch, SelectMemory& selecting, float* mine);

  std::mutex mutex_;
  Buffer query_memory_;
  Buffer sketch_memory_;
  Buffer attend_memory_;
  Buffer scratch_;
  std::vector<SelectMemory> selecting_;
  std::unique_ptr<Open[]> open_;
  size_t open_capacity_ = 0;
  std::atomic<int> appends_;
  std::atomic<int64_t> choosing_ns_;
  std::atomic<int64_t> reading_ns_;
};

// All layers of a step.
class SketchAttention : public LayerAttention {
 public:
  struct Layer {
    const SketchStep* step;
    SketchLayer places;
  };
  SketchAttention(SketchStepper& stepper, std::vector<Layer> layers, const NewTokens& tokens)
      : stepper_(stepper), layers_(std::move(layers)), tokens_(tokens) {}
  const void* attend(int layer, const Threads& threads) override;
  // Seconds of all layers so far, and which part of them went into choosing.
  double seconds() const { return static_cast<double>(nanoseconds_) * 1e-9; }
  double chose() const { return spent_.chose(); }

 private:
  SketchStepper& stepper_;
  const std::vector<Layer> layers_;
  const NewTokens tokens_;
  Spent spent_ = {0, 0};
  int64_t nanoseconds_ = 0;
};

}  // namespace alisa
