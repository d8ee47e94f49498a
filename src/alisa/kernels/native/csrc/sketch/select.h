// Choosing the tokens to read: the older tokens of highest score and the recent window, in ascending order; and adding the
// attention they received to the scores. Both are a few passes over a few thousand numbers, and were a visible part of a
// step as chains of torch operators (gather, fill, topk, concatenate, sort).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace alisa {

// What is used again from one row to the next.
struct SelectMemory {
  std::vector<uint32_t> keys;
  std::vector<uint32_t> candidates;
  std::vector<int32_t> found;
};

template <class Score>
struct SelectTask {
  const Score* scores;  // [sequences, stride]
  size_t stride;
  const int64_t* starts;         // [B]; null: row b of the scores belongs to sequence b
  const int32_t* older_ends;     // [B]: positions [0, older_end) compete
  const int32_t* older_counts;   // [B]: how many of them are taken, at most older_end
  const int32_t* counts;         // [B]: tokens taken in all; the rest follow older_end
  int num_seqs;
  int num_slots;       // K
  int32_t* positions;  // [B, K] ascending, 0 after counts[b]
};

// The older tokens of highest score, of equal ones those that come first.
template <class Score>
void select_positions(const SelectTask<Score>& task, const Threads& threads);
// The same for one row of positions, `older` of which are older than the window.
void select_row(const SelectTask<float>& task, int row, int older, SelectMemory& memory);
// The fewest older tokens, at most older_counts[row], that have at least `target` of the scores together with the window.
// Scores are counted in units of 2^-32, so that their sum does not depend on an order.
int count_to_cover(const SelectTask<float>& task, int row, int64_t target);

// sums[sum_starts[b] + position] += mass and the same in `buckets`, for the tokens of each sequence.
struct ObserveTask {
  double* sums;
  float* buckets;
  const int64_t* sum_starts;     // [B]
  const int64_t* bucket_starts;  // [B]
  const int32_t* positions;      // [B, K]
  const int32_t* counts;         // [B]
  const float* mass;             // [B, K]
  int num_seqs;
  int num_slots;
};

void observe_mass(const ObserveTask& task);

}  // namespace alisa
