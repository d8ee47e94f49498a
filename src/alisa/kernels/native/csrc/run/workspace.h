// The calls that Python makes, cut into pieces and shared out among threads.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "plan.h"
#include "prefill.h"
#include "select.h"
#include "threads.h"

namespace alisa {

// A selection that is read in several pieces: its plan and partial results outlive a call.
struct Pieces {
  Plan plan;
  Buffer memory;
};

// Owns what calls need beyond their arguments: megabytes freshly allocated for every layer would cost more in page faults
// than the arithmetic on them. One call at a time; a second caller waits.
class Workspace {
 public:
  // Decode attention; fills the plan of `task` (its last block of fields).
  void decode(const Isa& isa, DecodeTask task, const Threads& threads);
  // The same, a piece at a time: columns begins[b] to ends[b] - 1 of each sequence, from one multiple of kBlock to another
  // or to the last column. Pieces of a sequence come in order, and `pieces`, which begin empty, belong to one selection.
  // When all have come, `decode_end` writes what `decode` would have written, to the last bit.
  void decode_piece(const Isa& isa, DecodeTask task, Pieces& pieces, const int32_t* begins, const int32_t* ends,
                    const Threads& threads);
  void decode_end(const Isa& isa, DecodeTask task, Pieces& pieces, const Threads& threads);
  void encode(const Isa& isa, const EncodeTask& task, int64_t num_tokens, const Threads& threads);
  // Weights of all tokens by a sketch of their keys; fills the plan of `task`.
  void sketch_scores(const Isa& isa, SketchTask task, const Threads& threads);
  // The tokens that these weights choose, a row for each index set, and the share of each head's weight that they hold:
  // Float32[B, H]. Fills the plan and the output of `task`, and the scores of `chosen`. A sequence whose coverage (of
  // `coverages`, null: 0 for all) is above 0 has the fewest older tokens, the same number in each set, with which every set
  // has that part of its weight, at most those of `chosen`; `counts` Int32[B * num_sets] are the tokens chosen.
  void sketch_select(const Isa& isa, SketchTask task, SelectTask<float> chosen, const double* coverages, int32_t* counts,
                     float* shares, const Threads& threads);
  void sketch_append(const Isa& isa, const SketchAppendTask& task, int64_t num_tokens, const Threads& threads);
  // One thread: tokens of one sequence must not meet.
  void mean_add(const Isa& isa, const MeanAddTask& task);
  void mean_blend(const Isa& isa, const MeanBlendTask& task, int num_seqs, const Threads& threads);
  void rest_blend(const Isa& isa, const RestBlendTask& task, int num_seqs, const Threads& threads);
  // Attention of a prompt's tokens, and the weights of its last ones.
  void prefill(const PrefillIsa& isa, const PrefillTask& task, const Threads& threads);
  void prefill_mass(const PrefillIsa& isa, const MassTask& task, const Threads& threads);
  // Which blocks of keys blocks of queries read, and the means that say so.
  void prefill_means(const PrefillIsa& isa, const MeansTask& task, const Threads& threads);
  void prefill_choose(const PrefillIsa& isa, const ChoiceTask& task, const Threads& threads);

 private:
  // The threads that are worth waking.
  static Threads sketch_team(const SketchTask& task, const Threads& threads);
  // Weighs all tokens and calls finish(seq, scratch) for every sequence; `room` further floats of the plan become the
  // output of `task`, where it has none.
  template <class Finish>
  void run_sketch(const Isa& isa, SketchTask& task, size_t room, const Threads& threads, const Finish& finish);
  // Fills `items_` with runs of blocks [first(seq), last(seq)) of every sequence that lie within one partial result.
  // Items that one thread works on in a row form a bundle: where neighbours read the same rows (their `entries` are
  // equal; null: none do), all of them at one place, so that memory is asked for a row once.
  template <class First, class Last>
  void cut(int num_seqs, int item_blocks, const int32_t* entries, const First& first, const Last& last);
  // Calls attend(item, scratch) for all items and finish(seq, scratch) once all items of a sequence are through.
  template <class Attend, class Finish>
  void run_items(const Threads& threads, size_t scratch_floats, const Attend& attend, const Finish& finish);
  // Calls write(first, last, scratch) for runs of tokens.
  template <class Write>
  void run_tokens(const Threads& threads, int64_t num_tokens, size_t token_bytes, size_t scratch_floats, const Write& write);
  // Calls work(item, scratch) for items 0 to num_items - 1.
  template <class Work>
  void run_count(const Threads& threads, int num_items, size_t scratch_words, const Work& work);

  std::mutex mutex_;
  std::vector<Item> items_;
  std::vector<int> num_items_;    // [B]
  std::vector<int> first_item_;   // [bundles + 1]
  std::unique_ptr<std::atomic<int>[]> open_items_;
  size_t open_items_capacity_ = 0;
  Plan plan_;
  Buffer memory_;
  Buffer scratch_;
};

// The activation of an MLP, for all tokens of a call. Needs no memory of its own.
void activate(const Isa& isa, const ActivationTask& task, const Threads& threads);

// Heads in another basis.
void turn(const Isa& isa, const TurnTask& task, int64_t num_tokens, const Threads& threads);

}  // namespace alisa
