// See sketch_step.h.
#include "sketch_step.h"

#include <algorithm>
#include <chrono>

namespace alisa {
namespace {

std::vector<int> cut(const Plan& plan, int num_seqs, int item_blocks, std::vector<Item>& items) {
  std::vector<int> first_item(1, 0);
  for (int seq = 0; seq < num_seqs; ++seq) {
    const auto at = static_cast<size_t>(seq);
    const auto blocks = static_cast<int>(plan.first_block[at + 1] - plan.first_block[at]);
    for (int block = 0; block < blocks; block += item_blocks) {
      items.push_back({seq, block, std::min(item_blocks, blocks - block)});
    }
    first_item.push_back(static_cast<int>(items.size()));
  }
  return first_item;
}

void wait_for(const std::atomic<int>& open) {
  for (Patience patience; open.load(std::memory_order_acquire) > 0;) patience.wait();
}

void done(std::atomic<int>& open) { open.fetch_sub(1, std::memory_order_acq_rel); }

}  // namespace

SketchStep::SketchStep(const Isa& isa, const SketchStepTask& task) : isa_(isa), task_(task) {
  const int num_seqs = task.sketch.num_seqs;
  sketch_plan_.lay_out(task.sketch.lengths, num_seqs, kSketchBlock, kSketchItemBlocks);
  attend_plan_.lay_out(task.attend.counts, num_seqs, kBlock, kItemBlocks);
  first_sketch_item_ = cut(sketch_plan_, num_seqs, kSketchItemBlocks, sketch_items_);
  first_attend_item_ = cut(attend_plan_, num_seqs, kItemBlocks, attend_items_);
  size_t bytes = 0;
  for (int seq = 0; seq < num_seqs; ++seq) {
    const auto code_bytes = static_cast<size_t>(task.sketch.layout.code_bytes() + task.sketch.value_layout.code_bytes());
    bytes += static_cast<size_t>(task.sketch.lengths[seq]) * task.sketch.heads() * code_bytes;
    bytes += static_cast<size_t>(task.attend.counts[seq]) * task.attend.layout.row_bytes();
  }
  is_small_ = bytes < kSerialBytes;

  const int num_sets = task.sketch.num_sets;
  for (int row = 0; row < num_seqs * num_sets; ++row) {
    const int older = task.chosen.older_counts[row];
    int32_t* positions = task.chosen.positions + static_cast<size_t>(row) * task.chosen.num_slots;
    for (int i = older; i < task.chosen.counts[row]; ++i) positions[i] = task.chosen.older_ends[row] + i - older;
    find_slots(row, older, task.chosen.counts[row]);
  }
  for (int seq = 0; seq < num_seqs; ++seq) units_.push_back({Work::kAppend, seq, seq, false});
  // A sequence is read after the next one has been scored: scores that others are still at work on are there by then.
  for (int seq = 0; seq < num_seqs; ++seq) {
    for (int item = first_sketch_item_[seq]; item < first_sketch_item_[seq + 1]; ++item) {
      units_.push_back({Work::kScore, seq, item, false});
    }
    if (seq > 0) add_reading(seq - 1);
  }
  add_reading(num_seqs - 1);
}

void SketchStep::add_reading(int seq) {
  for (int item = first_sketch_item_[seq]; item < first_sketch_item_[seq + 1]; ++item) {
    units_.push_back({Work::kNormalise, seq, item, false});
  }
  units_.push_back({Work::kSelect, seq, 0, false});
  // Recent tokens are read while the older ones are chosen.
  const int older = task_.chosen.older_counts[seq * task_.sketch.num_sets];
  for (const bool selects : {false, true}) {
    for (int item = first_attend_item_[seq]; item < first_attend_item_[seq + 1]; ++item) {
      if ((attend_items_[item].first_block * kBlock < older) == selects) {
        units_.push_back({Work::kAttend, seq, item, selects});
      }
    }
  }
  for (int item = first_sketch_item_[seq]; item < first_sketch_item_[seq + 1]; ++item) {
    units_.push_back({Work::kComplete, seq, item, true});
  }
}

void SketchStep::find_slots(int row, int first, int last) const {
  const int seq = row / task_.sketch.num_sets;
  const int64_t table_row = task_.table_rows == nullptr ? seq : task_.table_rows[seq];
  const int32_t* table = task_.table + static_cast<size_t>(table_row) * task_.table_stride;
  const size_t begin = static_cast<size_t>(row) * task_.chosen.num_slots;
  for (int i = first; i < last; ++i) task_.slots[begin + i] = table[task_.chosen.positions[begin + i]];
}

void SketchStepper::open(const SketchStep& step) {
  const auto num_seqs = static_cast<size_t>(step.task_.sketch.num_seqs);
  if (open_capacity_ < num_seqs) {
    open_.reset(new Open[num_seqs]);
    open_capacity_ = num_seqs;
  }
  for (size_t seq = 0; seq < num_seqs; ++seq) {
    const int items = step.first_sketch_item_[seq + 1] - step.first_sketch_item_[seq];
    const int reads = step.first_attend_item_[seq + 1] - step.first_attend_item_[seq];
    open_[seq].scores = items;
    open_[seq].weights = items;
    open_[seq].choice = 1;
    open_[seq].reads = reads + items;
  }
  appends_ = static_cast<int>(num_seqs);
  choosing_ns_ = reading_ns_ = 0;
}

void SketchStepper::choose(const SketchStep& step, int seq, const SketchTask& sketch, SelectMemory& selecting, float* mine) {
  SelectTask<float> rows = step.task_.chosen;
  rows.scores = sketch.out;
  rows.stride = static_cast<size_t>(sketch.width);
  const int first = seq * sketch.num_sets;
  for (int row = first; row < first + sketch.num_sets; ++row) {
    select_row(rows, row, rows.older_counts[row], selecting);
    step.find_slots(row, 0, rows.older_counts[row]);
  }
  const auto stride = static_cast<size_t>(rows.num_slots);
  step.isa_.sketch.shares(sketch, seq, rows.positions + static_cast<size_t>(first) * stride, stride, rows.counts[first],
                          step.task_.shares + static_cast<size_t>(seq) * step.task_.attend.num_heads, mine);
}

void SketchStepper::do_unit(const SketchStep& step, const SketchStep::Unit& unit, const Tasks& tasks, SelectMemory& selecting,
                            float* mine) {
  using Work = SketchStep::Work;
  const Isa& isa = step.isa_;
  Open& open = open_[static_cast<size_t>(unit.seq)];
  const SelectTask<float>& chosen = step.task_.chosen;
  const int first_row = unit.seq * tasks.sketch.num_sets;
  switch (unit.work) {
    case Work::kAppend:
      isa.encode(tasks.rows, unit.index, unit.index + 1, mine);
      isa.sketch.append(tasks.keys, unit.index, unit.index + 1, mine);
      isa.sketch.append(tasks.values, unit.index, unit.index + 1, mine);
      isa.sketch.prepare(tasks.sketch, unit.seq, mine);
      return done(appends_);
    case Work::kScore:
      wait_for(appends_);
      isa.sketch.scores(tasks.sketch, unit.index, mine);
      return done(open.scores);
    case Work::kNormalise: {
      wait_for(open.scores);
      const Item& item = step.sketch_items_[static_cast<size_t>(unit.index)];
      isa.sketch.normalise(tasks.sketch, unit.seq, item.first_block, item.num_blocks, mine);
      return done(open.weights);
    }
    case Work::kSelect:
      wait_for(open.weights);
      choose(step, unit.seq, tasks.sketch, selecting, mine);
      return done(open.choice);
    case Work::kAttend:
      if (unit.selects) wait_for(open.choice);
      isa.attend(tasks.attend, unit.index, mine);
      break;
    case Work::kComplete: {
      wait_for(open.choice);
      const auto stride = static_cast<size_t>(chosen.num_slots);
      const int32_t* positions = chosen.positions + static_cast<size_t>(first_row) * stride;
      isa.sketch.complete(tasks.sketch, unit.index, positions, stride, chosen.counts[first_row], mine);
      break;
    }
  }
  if (open.reads.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  isa.finish(tasks.attend, unit.seq, mine);
  isa.sketch.rest(tasks.sketch, unit.seq, chosen.counts[first_row], mine);
  isa.rest_blend({tasks.attend.num_heads, tasks.attend.layout.head_dim, tasks.attend.out, step.task_.out, tasks.attend.q_dtype,
                  step.task_.shares, tasks.sketch.rest},
                 unit.seq, mine);
}

Spent SketchStepper::run(const SketchStep& step, const SketchLayer& layer, const NewTokens& tokens, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Isa& isa = step.isa_;
  const SketchStepTask& task = step.task_;
  const Dtype dtype = task.attend.q_dtype;
  Tasks tasks = {
      {tokens.k, tokens.v, dtype, tokens.k_stride, tokens.v_stride, layer.rows, task.attend.row_stride, task.attend.layout,
       task.new_slots},
      {task.sketch.layout, tokens.k, dtype, tokens.k_stride, layer.key_codes, layer.key_ranges, task.new_ids},
      {task.sketch.value_layout, tokens.v, dtype, tokens.v_stride, layer.value_codes, layer.value_ranges, task.new_ids},
      task.sketch,
      task.attend,
  };
  tasks.sketch.q = tokens.q;
  tasks.sketch.codes = layer.key_codes;
  tasks.sketch.ranges = layer.key_ranges;
  tasks.sketch.value_codes = layer.value_codes;
  tasks.sketch.value_ranges = layer.value_ranges;
  tasks.sketch.items = step.sketch_items_.data();
  tasks.attend.q = tokens.q;
  tasks.attend.rows = layer.rows;
  tasks.attend.items = step.attend_items_.data();
  const size_t rows = static_cast<size_t>(task.sketch.num_seqs) * task.sketch.num_sets;
  place(tasks.sketch, step.sketch_plan_, rows * static_cast<size_t>(task.sketch.width), sketch_memory_);
  const size_t query_floats = isa.sketch.query_floats(task.sketch.layout, task.sketch.num_heads);
  tasks.sketch.queries = query_memory_.room(static_cast<size_t>(task.sketch.num_seqs) * query_floats);
  place(tasks.attend, step.attend_plan_, attend_memory_);
  open(step);

  Threads team = threads;
  if (step.is_small_) team.count = 1;
  const size_t floats = whole_lines(std::max({isa.scratch_floats(task.attend.layout, task.attend.num_heads),
                                              isa.sketch.floats(task.sketch.layout, task.sketch.num_heads),
                                              isa.mean_floats(task.attend.layout.head_dim)}));
  float* memory = scratch_.room(floats * static_cast<size_t>(team.count));
  selecting_.resize(std::max(selecting_.size(), static_cast<size_t>(team.count)));
  share_out(team, static_cast<int64_t>(step.units_.size()), 1, [&](int thread) {
    const auto number = static_cast<size_t>(thread);
    return [&, number, before = std::chrono::steady_clock::now()](int64_t index, int64_t) mutable {
      const SketchStep::Unit& unit = step.units_[static_cast<size_t>(index)];
      do_unit(step, unit, tasks, selecting_[number], memory + floats * number);
      const auto now = std::chrono::steady_clock::now();
      const bool reads = unit.work == SketchStep::Work::kAttend;
      (reads ? reading_ns_ : choosing_ns_) += std::chrono::nanoseconds(now - before).count();
      before = now;
    };
  });
  return {choosing_ns_, reading_ns_};
}

const void* SketchAttention::attend(int layer, const Threads& threads) {
  const auto start = std::chrono::steady_clock::now();
  const Layer& own = layers_[static_cast<size_t>(layer)];
  const Spent spent = stepper_.run(*own.step, own.places, tokens_, threads);
  spent_.choosing += spent.choosing;
  spent_.reading += spent.reading;
  nanoseconds_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  return own.step->out();
}

}  // namespace alisa
