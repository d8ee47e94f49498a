// See select.h.
//
// The k-th largest score is found by a histogram over the leading bits of the scores (their bit patterns, made
// monotonic), counted from the top: one pass counts, one collects what is not below the decisive bin, and short ones over
// these find the threshold and drop what is below it. Nothing is sorted.
#include "select.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

namespace alisa {
namespace {

template <class Score>
struct Bits;
template <>
struct Bits<float> {
  using Key = uint32_t;
  static constexpr int kMantissa = 23;
};
template <>
struct Bits<double> {
  using Key = uint64_t;
  static constexpr int kMantissa = 52;
};

// Unsigned integers in the order of the scores; -0 and 0 are the same.
template <class Score>
inline typename Bits<Score>::Key key_of(Score score) {
  using Key = typename Bits<Score>::Key;
  score += Score(0);
  Key bits;
  std::memcpy(&bits, &score, sizeof(bits));
  constexpr Key kSign = Key(1) << (sizeof(Key) * 8 - 1);
  return bits & kSign ? ~bits : bits | kSign;
}

// 64 bins for each power of two, 32 powers of two below the largest score; smaller scores share bin 0.
constexpr int kBinBits = 6;
constexpr int kNumBins = 2048;

template <class Score>
class Selector {
 public:
  using Key = typename Bits<Score>::Key;

  Selector(std::vector<Key>& keys, std::vector<Key>& candidates, std::vector<int32_t>& found)
      : keys_(keys), candidates_(candidates), found_(found) {}

  // The positions of the `count` largest of `scores[0, end)`, ascending; 0 < count < end.
  void select(const Score* scores, int end, int count, int32_t* positions) {
    keys_.resize(static_cast<size_t>(end));
    Key highest = 0;
    for (int i = 0; i < end; ++i) {
      keys_[i] = key_of(scores[i]);
      highest = std::max(highest, keys_[i]);
    }
    std::memset(bins_, 0, sizeof(bins_));
    const Key top = highest >> kShift;
    base_ = top >= kNumBins - 1 ? top - (kNumBins - 1) : 0;
    for (int i = 0; i < end; ++i) ++bins_[bin(keys_[i])];

    int above = 0;
    int decisive = kNumBins - 1;
    for (; above + bins_[decisive] < count; --decisive) above += bins_[decisive];
    const Key least = decisive > 0 ? (base_ + static_cast<Key>(decisive)) << kShift : 0;
    found_.resize(static_cast<size_t>(end));
    int num_found = 0;
    for (int i = 0; i < end; ++i) {
      found_[num_found] = i;
      num_found += keys_[i] >= least;
    }
    candidates_.clear();
    for (int n = 0; n < num_found; ++n) {
      const Key key = keys_[found_[n]];
      if (bin(key) == decisive) candidates_.push_back(key);
    }
    const int rank = count - above;  // in the decisive bin, from 1
    std::nth_element(candidates_.begin(), candidates_.begin() + (rank - 1), candidates_.end(), std::greater<Key>());
    const Key threshold = candidates_[rank - 1];
    int ties = rank;
    for (const Key key : candidates_) ties -= key > threshold;

    int written = 0;
    for (int n = 0; written < count; ++n) {
      const Key key = keys_[found_[n]];
      const bool tie = key == threshold && ties > 0;
      ties -= tie;
      positions[written] = found_[n];
      written += key > threshold || tie;
    }
  }

 private:
  static constexpr int kShift = Bits<Score>::kMantissa - kBinBits;

  int bin(Key key) const {
    const Key leading = key >> kShift;
    return leading > base_ ? static_cast<int>(leading - base_) : 0;
  }

  std::vector<Key>& keys_;
  std::vector<Key>& candidates_;
  std::vector<int32_t>& found_;
  Key base_ = 0;
  int bins_[kNumBins];
};

template <class Score>
const Score* scores_of(const SelectTask<Score>& task, int seq) {
  return task.scores + static_cast<size_t>(task.starts == nullptr ? seq : task.starts[seq]) * task.stride;
}

template <class Score>
void select_row(const SelectTask<Score>& task, int seq, int older, Selector<Score>& selector) {
  const int end = task.older_ends[seq];
  int32_t* positions = task.positions + static_cast<size_t>(seq) * task.num_slots;
  if (older >= end) {
    for (int i = 0; i < older; ++i) positions[i] = i;
  } else if (older > 0) {
    selector.select(scores_of(task, seq), end, older, positions);
  }
  const int count = task.counts[seq] - task.older_counts[seq] + older;
  for (int i = older; i < count; ++i) positions[i] = end + i - older;
  std::fill(positions + count, positions + task.num_slots, 0);
}

}  // namespace

template <class Score>
void select_positions(const SelectTask<Score>& task, const Threads& threads) {
  Threads team = threads;
  team.count = std::min(team.count, task.num_seqs);
  share_out(team, task.num_seqs, 1, [&](int) {
    using Keys = std::vector<typename Bits<Score>::Key>;
    return [&, keys = Keys(), candidates = Keys(), found = std::vector<int32_t>()](int64_t seq, int64_t) mutable {
      const auto row = static_cast<int>(seq);
      Selector<Score> selector(keys, candidates, found);
      select_row(task, row, task.older_counts[row], selector);
    };
  });
}

void select_row(const SelectTask<float>& task, int row, int older, SelectMemory& memory) {
  Selector<float> selector(memory.keys, memory.candidates, memory.found);
  select_row(task, row, older, selector);
}

int count_to_cover(const SelectTask<float>& task, int row, int64_t target) {
  const auto units = [](float score) { return static_cast<int64_t>(static_cast<double>(score) * 4294967296.0); };
  const float* scores = scores_of(task, row);
  const int most = task.older_counts[row];
  const int end = task.older_ends[row];
  for (int i = end; i < end + task.counts[row] - most; ++i) target -= units(scores[i]);
  std::vector<int32_t> positions(static_cast<size_t>(most));
  if (most < end && most > 0) {
    SelectMemory memory;
    Selector<float>(memory.keys, memory.candidates, memory.found).select(scores, end, most, positions.data());
  } else {
    for (int i = 0; i < most; ++i) positions[i] = i;
  }
  std::vector<float> best;
  for (const int32_t position : positions) best.push_back(scores[position]);
  std::sort(best.begin(), best.end(), std::greater<float>());
  int count = 0;
  for (; count < most && target > 0; ++count) target -= units(best[count]);
  return count;
}

template void select_positions<float>(const SelectTask<float>&, const Threads&);
template void select_positions<double>(const SelectTask<double>&, const Threads&);

void observe_mass(const ObserveTask& task) {
  for (int seq = 0; seq < task.num_seqs; ++seq) {
    const size_t row = static_cast<size_t>(seq) * task.num_slots;
    double* sums = task.sums + task.sum_starts[seq];
    float* buckets = task.buckets + task.bucket_starts[seq];
    for (int i = 0; i < task.counts[seq]; ++i) {
      const int32_t position = task.positions[row + i];
      const float mass = task.mass[row + i];
      sums[position] += mass;
      buckets[position] += mass;
    }
  }
}

}  // namespace alisa
