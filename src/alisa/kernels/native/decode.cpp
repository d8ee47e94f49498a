// See decode.h.
#include "decode.h"

#include <algorithm>

namespace alisa {
namespace {

// Pieces of work for each thread: enough that a thread which loses its core for a moment does not hold up the others.
constexpr int kItemsPerThread = 8;

// Rows below this total are attended by one thread: waking another takes a few microseconds, in which one core reads
// some 40 KB.
constexpr size_t kSerialBytes = 1 << 16;

// Growing only: the content is rewritten by every call.
template <class T>
T* room(std::vector<T>& buffer, size_t count) {
  if (buffer.size() < count) {
    buffer.clear();
    buffer.resize(count);
  }
  return buffer.data();
}

}  // namespace

void Workspace::plan(DecodeTask& task, int num_threads) {
  size_t num_blocks = 0;
  for (int seq = 0; seq < task.num_seqs; ++seq) num_blocks += (task.counts[seq] + kBlock - 1) / kBlock;
  const size_t pieces = static_cast<size_t>(num_threads) * kItemsPerThread;
  const size_t item_blocks = std::max<size_t>(1, num_threads == 1 ? num_blocks : (num_blocks + pieces - 1) / pieces);

  items_.clear();
  first_item_.assign(1, 0);
  size_t base = 0;
  for (int seq = 0; seq < task.num_seqs; ++seq) {
    const size_t blocks = (task.counts[seq] + kBlock - 1) / kBlock;
    for (size_t first = 0; first < blocks; first += item_blocks) {
      const size_t count = std::min(item_blocks, blocks - first);
      items_.push_back({seq, static_cast<int>(first), static_cast<int>(count), base + first});
    }
    base += blocks;
    first_item_.push_back(static_cast<int>(items_.size()));
  }

  const size_t heads = static_cast<size_t>(task.num_heads);
  const size_t weights = num_blocks * heads * kBlock;
  const size_t maxima = num_blocks * heads;
  const size_t partials = items_.size() * heads;
  const size_t outs = partials * task.layout.head_stride();
  float* memory = room(floats_, weights + maxima + outs + 2 * partials);
  task.items = items_.data();
  task.first_item = first_item_.data();
  task.weights = memory;
  task.block_max = task.weights + weights;
  task.partial_out = task.block_max + maxima;
  task.partial_max = task.partial_out + outs;
  task.partial_sum = task.partial_max + partials;
}

float* Workspace::scratch(size_t floats_per_thread, int num_threads) {
  return room(scratch_, floats_per_thread * static_cast<size_t>(num_threads));
}

void Workspace::decode(const Isa& isa, DecodeTask task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t num_rows = 0;
  for (int seq = 0; seq < task.num_seqs; ++seq) num_rows += static_cast<size_t>(task.counts[seq]);
  Threads team = threads;
  if (num_rows * task.layout.row_bytes() < kSerialBytes) team.count = 1;
  plan(task, team.count);

  const auto num_seqs = static_cast<size_t>(task.num_seqs);
  if (open_items_capacity_ < num_seqs) {
    open_items_.reset(new std::atomic<int>[num_seqs]);
    open_items_capacity_ = num_seqs;
  }
  for (int seq = 0; seq < task.num_seqs; ++seq) open_items_[seq] = first_item_[seq + 1] - first_item_[seq];

  const size_t floats = (isa.scratch_floats(task.layout, task.num_heads) + kPad) / kPad * kPad;
  float* memory = scratch(floats, team.count);
  std::atomic<int> next_item{0};
  std::atomic<int> next_thread{0};
  const int num_items = static_cast<int>(items_.size());
  const auto work = [&]() {
    float* mine = memory + floats * static_cast<size_t>(next_thread.fetch_add(1));
    for (int item = next_item.fetch_add(1); item < num_items; item = next_item.fetch_add(1)) {
      isa.attend(task, item, mine);
      // Whoever completes a sequence merges its partial results: no thread waits for another.
      const int seq = task.items[item].seq;
      if (open_items_[seq].fetch_sub(1) == 1) isa.finish(task, seq, mine);
    }
  };
  parallel(team, work);
}

void Workspace::encode(const Isa& isa, const EncodeTask& task, int64_t num_tokens, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Threads team = threads;
  const size_t bytes = static_cast<size_t>(num_tokens) * task.layout.row_bytes();
  if (bytes < kSerialBytes) team.count = 1;
  const size_t floats = (isa.scratch_floats(task.layout, task.layout.num_kv_heads) + kPad) / kPad * kPad;
  float* memory = scratch(floats, team.count);
  std::atomic<int64_t> next_token{0};
  std::atomic<int> next_thread{0};
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, num_tokens / (4 * team.count)));
  const auto work = [&]() {
    float* mine = memory + floats * static_cast<size_t>(next_thread.fetch_add(1));
    for (int64_t first = next_token.fetch_add(step); first < num_tokens; first = next_token.fetch_add(step)) {
      isa.encode(task, first, std::min(first + step, num_tokens), mine);
    }
  };
  parallel(team, work);
}

}  // namespace alisa
