// See workspace.h.
#include "workspace.h"

#include <algorithm>

namespace alisa {
namespace {

// Activations below this many are made by the calling thread alone: it needs about a microsecond for 3,000.
constexpr int64_t kSerialActivations = 1 << 15;
// The same for single products of turned heads.
constexpr int64_t kSerialProducts = 1 << 18;
// Pieces of work for each thread, so that one that is held up leaves more to the others.
constexpr int64_t kItemsPerThread = 8;

// Packed keys and values of as many KV heads as this are held at once: they stay in a shared cache from being packed to
// being read, and a long prompt takes no more memory than one head of it asks for.
constexpr size_t kPackedBytes = size_t{4} << 20;

}  // namespace

template <class First, class Last>
void Workspace::cut(int num_seqs, int item_blocks, const int32_t* entries, const First& first, const Last& last) {
  items_.clear();
  num_items_.assign(static_cast<size_t>(num_seqs), 0);
  first_item_.assign(1, 0);
  for (int begin = 0, end; begin < num_seqs; begin = end) {
    int from = first(begin), to = last(begin);
    for (end = begin + 1; entries != nullptr && end < num_seqs && entries[end] == entries[begin]; ++end) {
      from = std::min(from, first(end));
      to = std::max(to, last(end));
    }
    for (int start = from / item_blocks * item_blocks; start < to; start += item_blocks) {
      for (int seq = begin; seq < end; ++seq) {
        const int block = std::max(start, first(seq)), stop = std::min(start + item_blocks, last(seq));
        if (block >= stop) continue;
        items_.push_back({seq, block, stop - block});
        ++num_items_[static_cast<size_t>(seq)];
      }
      first_item_.push_back(static_cast<int>(items_.size()));
    }
  }
}

template <class Attend, class Finish>
void Workspace::run_items(const Threads& threads, size_t scratch_floats, const Attend& attend, const Finish& finish) {
  const size_t num_seqs = num_items_.size();
  if (open_items_capacity_ < num_seqs) {
    open_items_.reset(new std::atomic<int>[num_seqs]);
    open_items_capacity_ = num_seqs;
  }
  for (size_t seq = 0; seq < num_seqs; ++seq) open_items_[seq] = num_items_[seq];

  const size_t floats = whole_lines(scratch_floats);
  float* memory = scratch_.room(floats * static_cast<size_t>(threads.count));
  share_out(threads, static_cast<int64_t>(first_item_.size()) - 1, 1, [&](int thread) {
    return [&, mine = memory + floats * static_cast<size_t>(thread)](int64_t bundle, int64_t) {
      const auto at = static_cast<size_t>(bundle);
      for (int item = first_item_[at]; item < first_item_[at + 1]; ++item) {
        attend(item, mine);
        // Whoever completes a sequence merges its partial results: no thread waits for another.
        const int seq = items_[static_cast<size_t>(item)].seq;
        if (open_items_[seq].fetch_sub(1) == 1) finish(seq, mine);
      }
    };
  });
}

template <class Write>
void Workspace::run_tokens(const Threads& threads, int64_t num_tokens, size_t token_bytes, size_t scratch_floats,
                           const Write& write) {
  Threads team = threads;
  if (static_cast<size_t>(num_tokens) * token_bytes < kSerialBytes) team.count = 1;
  const size_t floats = whole_lines(scratch_floats);
  float* memory = scratch_.room(floats * static_cast<size_t>(team.count));
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, num_tokens / (4 * team.count)));
  share_out(team, num_tokens, step, [&](int thread) {
    return [&, mine = memory + floats * static_cast<size_t>(thread)](int64_t first, int64_t last) { write(first, last, mine); };
  });
}

void Workspace::decode(const Isa& isa, DecodeTask task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t num_rows = 0;
  for (int seq = 0; seq < task.num_seqs; ++seq) num_rows += static_cast<size_t>(task.counts[seq]);
  Threads team = threads;
  if (num_rows * task.layout.row_bytes() < kSerialBytes) team.count = 1;
  plan_.lay_out(task.counts, task.num_seqs, kBlock, kItemBlocks);
  place(task, plan_, memory_);
  cut(
      task.num_seqs, kItemBlocks, task.entries, [](int) { return 0; },
      [&](int seq) { return blocks_of(task.counts[seq], kBlock); });
  task.items = items_.data();
  run_items(
      team, isa.scratch_floats(task.layout, task.num_heads), [&](int item, float* mine) { isa.attend(task, item, mine); },
      [&](int seq, float* mine) { isa.finish(task, seq, mine); });
}

void Workspace::decode_piece(const Isa& isa, DecodeTask task, Pieces& pieces, const int32_t* begins, const int32_t* ends,
                             const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pieces.plan.first_block.empty()) pieces.plan.lay_out(task.counts, task.num_seqs, kBlock, kItemBlocks);
  place(task, pieces.plan, pieces.memory);
  cut(
      task.num_seqs, kItemBlocks, task.entries, [&](int seq) { return begins[seq] / kBlock; },
      [&](int seq) { return begins[seq] < ends[seq] ? blocks_of(ends[seq], kBlock) : 0; });
  task.items = items_.data();
  run_items(
      threads, isa.scratch_floats(task.layout, task.num_heads), [&](int item, float* mine) { isa.attend(task, item, mine); },
      [](int, float*) {});
}

void Workspace::decode_end(const Isa& isa, DecodeTask task, Pieces& pieces, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  place(task, pieces.plan, pieces.memory);
  run_count(threads, task.num_seqs, isa.scratch_floats(task.layout, task.num_heads),
            [&](int seq, uint32_t* mine) { isa.finish(task, seq, reinterpret_cast<float*>(mine)); });
}

void Workspace::encode(const Isa& isa, const EncodeTask& task, int64_t num_tokens, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  run_tokens(threads, num_tokens, task.layout.row_bytes(), isa.scratch_floats(task.layout, task.layout.num_kv_heads),
             [&](int64_t first, int64_t last, float* mine) { isa.encode(task, first, last, mine); });
}

// Work goes with the products, of which there is one for every query head.
Threads Workspace::sketch_team(const SketchTask& task, const Threads& threads) {
  size_t num_tokens = 0;
  for (int seq = 0; seq < task.num_seqs; ++seq) num_tokens += static_cast<size_t>(task.lengths[seq]);
  const int code_bytes = task.layout.code_bytes() + (task.completes() ? task.value_layout.code_bytes() : 0);
  Threads team = threads;
  if (num_tokens * static_cast<size_t>(task.heads()) * static_cast<size_t>(code_bytes) < kSerialBytes) team.count = 1;
  return team;
}

template <class Finish>
void Workspace::run_sketch(const Isa& isa, SketchTask& task, size_t room, const Threads& threads, const Finish& finish) {
  plan_.lay_out(task.lengths, task.num_seqs, kSketchBlock, kSketchItemBlocks);
  cut(
      task.num_seqs, kSketchItemBlocks, nullptr, [](int) { return 0; },
      [&](int seq) { return blocks_of(task.lengths[seq], kSketchBlock); });
  place(task, plan_, room, memory_);
  task.items = items_.data();
  run_items(
      sketch_team(task, threads), isa.sketch.floats(task.layout, task.num_heads),
      [&](int item, float* mine) { isa.sketch.scores(task, item, mine); },
      finish);
}

void Workspace::sketch_scores(const Isa& isa, SketchTask task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  run_sketch(isa, task, 0, threads, [&](int seq, float* mine) { isa.sketch.finish(task, seq, mine); });
}

void Workspace::sketch_select(const Isa& isa, SketchTask task, SelectTask<float> chosen, const double* coverages,
                              int32_t* counts, float* shares, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto width = static_cast<size_t>(task.width);
  const auto stride = static_cast<size_t>(chosen.num_slots);
  run_sketch(isa, task, width * static_cast<size_t>(task.num_seqs) * task.num_sets, threads, [&](int seq, float* mine) {
    isa.sketch.finish(task, seq, mine);
    SelectTask<float> rows = chosen;
    rows.scores = task.out;
    rows.stride = width;
    const int first = seq * task.num_sets;
    int older = rows.older_counts[first];
    const double coverage = coverages == nullptr ? 0.0 : coverages[seq];
    if (coverage > 0.0) {
      const int set_heads = task.num_heads / task.parts / task.num_sets;
      const auto target = static_cast<int64_t>(coverage * set_heads * 4294967296.0);
      older = 0;
      for (int set = 0; set < task.num_sets; ++set) older = std::max(older, count_to_cover(rows, first + set, target));
    }
    const int count = rows.counts[first] - rows.older_counts[first] + older;
    SelectMemory selecting;
    for (int set = 0; set < task.num_sets; ++set) {
      select_row(rows, first + set, older, selecting);
      counts[first + set] = count;
    }
    isa.sketch.shares(task, seq, chosen.positions + static_cast<size_t>(first) * stride, stride, count,
                      shares + static_cast<size_t>(seq) * (task.num_heads / task.parts), mine);
  });
  if (!task.completes()) return;
  const auto count_of = [&](int seq) { return counts[seq * task.num_sets]; };
  run_items(
      sketch_team(task, threads), isa.sketch.floats(task.layout, task.num_heads),
      [&](int item, float* mine) {
        const int seq = items_[static_cast<size_t>(item)].seq;
        const int32_t* positions = chosen.positions + static_cast<size_t>(seq) * task.num_sets * stride;
        isa.sketch.complete(task, item, positions, stride, count_of(seq), mine);
      },
      [&](int seq, float* mine) { isa.sketch.rest(task, seq, count_of(seq), mine); });
}

void Workspace::sketch_append(const Isa& isa, const SketchAppendTask& task, int64_t num_tokens, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  run_tokens(threads, num_tokens, task.stride, isa.sketch.floats(task.layout, task.layout.num_kv_heads),
             [&](int64_t first, int64_t last, float* mine) { isa.sketch.append(task, first, last, mine); });
}

void Workspace::mean_add(const Isa& isa, const MeanAddTask& task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  isa.mean_add(task, scratch_.room(isa.mean_floats(task.head_dim)));
}

void Workspace::mean_blend(const Isa& isa, const MeanBlendTask& task, int num_seqs, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t seq_bytes = static_cast<size_t>(task.num_heads) * task.head_dim * sizeof(float);
  run_tokens(threads, num_seqs, seq_bytes, isa.mean_floats(task.head_dim), [&](int64_t first, int64_t last, float* mine) {
    for (int64_t seq = first; seq < last; ++seq) isa.mean_blend(task, static_cast<int>(seq), mine);
  });
}

void Workspace::rest_blend(const Isa& isa, const RestBlendTask& task, int num_seqs, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t seq_bytes = static_cast<size_t>(task.num_heads) * task.head_dim * sizeof(float);
  run_tokens(threads, num_seqs, seq_bytes, isa.mean_floats(task.head_dim), [&](int64_t first, int64_t last, float* mine) {
    for (int64_t seq = first; seq < last; ++seq) isa.rest_blend(task, static_cast<int>(seq), mine);
  });
}

template <class Work>
void Workspace::run_count(const Threads& threads, int num_items, size_t scratch_words, const Work& work) {
  const size_t words = whole_lines(scratch_words);
  auto* memory = reinterpret_cast<uint32_t*>(scratch_.room(words * static_cast<size_t>(threads.count)));
  share_out(threads, num_items, 1, [&](int thread) {
    return [&, mine = memory + words * static_cast<size_t>(thread)](int64_t item, int64_t) { work(static_cast<int>(item), mine); };
  });
}

void Workspace::prefill(const PrefillIsa& isa, const PrefillTask& task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int num_blocks = task.num_blocks();
  const int num_tiles = (task.num_queries * task.group() + isa.tile - 1) / isa.tile;
  const size_t block_words = isa.block_words(task);
  const size_t head_words = block_words * static_cast<size_t>(num_blocks);
  const size_t heads = kPackedBytes / sizeof(uint32_t) / head_words;
  const int step = std::max(1, std::min(static_cast<int>(heads), task.num_kv_heads));
  auto* packed = reinterpret_cast<uint32_t*>(memory_.room(head_words * static_cast<size_t>(step)));
  for (int first = 0; first < task.num_kv_heads; first += step) {
    const int count = std::min(step, task.num_kv_heads - first);
    run_count(threads, count * num_blocks, 0, [&](int item, uint32_t*) {
      isa.pack(task, first + item / num_blocks, item % num_blocks, packed + block_words * static_cast<size_t>(item));
    });
    run_count(threads, count * num_tiles, isa.scratch_words(task), [&](int item, uint32_t* mine) {
      // From the end: the last tiles see the most keys, and a short piece of work should be the last to finish.
      const int tile = num_tiles - 1 - item / count;
      isa.attend(task, first + item % count, tile, packed + head_words * static_cast<size_t>(item % count), mine);
    });
  }
}

void Workspace::prefill_mass(const PrefillIsa& isa, const MassTask& task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int num_blocks = task.num_blocks();
  const int num_tiles = (task.num_queries + isa.mass_tile - 1) / isa.mass_tile;
  run_count(threads, num_tiles * num_blocks, isa.mass_scratch_words(task),
            [&](int item, uint32_t* mine) { isa.mass(task, item / num_blocks, item % num_blocks, mine); });
}

void Workspace::prefill_means(const PrefillIsa& isa, const MeansTask& task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  run_count(threads, task.num_blocks, 0, [&](int item, uint32_t*) { isa.means(task, item); });
}

void Workspace::prefill_choose(const PrefillIsa& isa, const ChoiceTask& task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int heads = task.num_kv_heads;
  run_count(threads, task.num_queries / kQueryBlock * heads, isa.choice_scratch_words(task),
            [&](int item, uint32_t* mine) { isa.choose(task, item / heads, item % heads, mine); });
}

void activate(const Isa& isa, const ActivationTask& task, const Threads& threads) {
  const int64_t values = task.num_tokens * task.width;
  Threads team = threads;
  if (values < kSerialActivations) team.count = 1;
  const int64_t step = std::max<int64_t>(1, task.num_tokens / (kItemsPerThread * team.count));
  share_out(team, task.num_tokens, step, [&](int) {
    return [&](int64_t first, int64_t last) { isa.activate(task, first, last); };
  });
}

void turn(const Isa& isa, const TurnTask& task, int64_t num_tokens, const Threads& threads) {
  const int64_t products = num_tokens * task.num_heads * task.head_dim * task.head_dim;
  Threads team = threads;
  if (products < kSerialProducts) team.count = 1;
  const int64_t step = std::max<int64_t>(1, num_tokens / (kItemsPerThread * team.count));
  share_out(team, num_tokens, step, [&](int) {
    return [&, mine = std::vector<float>(task.floats())](int64_t first, int64_t last) mutable {
      isa.turn(task, first, last, mine.data());
    };
  });
}

}  // namespace alisa
