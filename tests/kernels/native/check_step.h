// A layer of a step in one call against the single calls, on buffers of exactly the size that is needed.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "sketch_step.h"
#include "workspace.h"

namespace check {

using namespace alisa;

struct StepCase {
  RowLayout layout;
  int group;
  bool per_head;
};

// Whether all outputs are the same to the bit.
inline bool step_agrees(const Isa& isa, const StepCase& given, std::mt19937& random) {
  const RowLayout& layout = given.layout;
  const int kv_heads = layout.num_kv_heads, dim = layout.head_dim, num_heads = kv_heads * given.group;
  const int num_seqs = 3, num_sets = given.per_head ? kv_heads : 1, num_tokens = 420;
  const int32_t lengths[] = {1, 33, 300};
  const int64_t starts[] = {7, 10, num_tokens - 300}, ids[] = {7, 42, num_tokens - 1};
  const SketchLayout key_layout = {4, kv_heads, dim}, value_layout = {2, kv_heads, dim};
  const size_t values = static_cast<size_t>(kv_heads) * dim, queries = static_cast<size_t>(num_seqs) * num_heads * dim;
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count) {
    std::vector<float> made(count);
    for (float& value : made) value = normal(random);
    return made;
  };
  const std::vector<float> k = floats(num_tokens * values), v = floats(num_tokens * values), q = floats(queries);
  std::vector<uint8_t> rows(static_cast<size_t>(num_tokens) * layout.row_bytes());
  std::vector<uint8_t> key_codes(num_tokens * static_cast<size_t>(kv_heads) * key_layout.code_bytes());
  std::vector<uint8_t> value_codes(num_tokens * static_cast<size_t>(kv_heads) * value_layout.code_bytes());
  std::vector<uint16_t> key_ranges(static_cast<size_t>(num_tokens) * kv_heads * 2), value_ranges(key_ranges.size());
  std::vector<int64_t> all(num_tokens);
  std::vector<int32_t> table(static_cast<size_t>(num_seqs) * 300);
  for (int i = 0; i < num_tokens; ++i) all[i] = i;
  for (int seq = 0; seq < num_seqs; ++seq) {
    for (int i = 0; i < 300; ++i) table[seq * 300 + i] = static_cast<int32_t>(starts[seq]) + (i < lengths[seq] ? i : 0);
  }
  const Threads threads{nullptr, 3, nullptr, nullptr};
  Workspace workspace;
  workspace.encode(isa, {k.data(), v.data(), Dtype::kFloat32, values * 4, values * 4, rows.data(), layout.row_bytes(), layout, all.data()},
                   num_tokens, threads);
  workspace.sketch_append(isa, {key_layout, k.data(), Dtype::kFloat32, values * 4, key_codes.data(), key_ranges.data(), all.data()},
                          num_tokens, threads);
  workspace.sketch_append(
      isa, {value_layout, v.data(), Dtype::kFloat32, values * 4, value_codes.data(), value_ranges.data(), all.data()}, num_tokens,
      threads);

  const int num_rows = num_seqs * num_sets;
  std::vector<int32_t> ends(num_rows), older(num_rows), counts(num_rows), of_seqs(num_seqs);
  for (int row = 0; row < num_rows; ++row) {
    const int earlier = lengths[row / num_sets] - 1;
    ends[row] = earlier - earlier / 4;
    older[row] = earlier / 4;
    counts[row] = of_seqs[row / num_sets] = 1 + 2 * (earlier / 4);
  }
  const int num_slots = 1 + 2 * (299 / 4);
  struct Result {
    std::vector<int32_t> positions, slots;
    std::vector<float> shares, rest, attended, out, log_sum_exp;
  };
  const auto room = [&] {
    const size_t places = static_cast<size_t>(num_rows) * num_slots, heads = static_cast<size_t>(num_seqs) * num_heads;
    return Result{std::vector<int32_t>(places), std::vector<int32_t>(places), std::vector<float>(heads), std::vector<float>(queries),
                  std::vector<float>(queries), std::vector<float>(queries), std::vector<float>(heads)};
  };
  const auto sketch_of = [&](Result& result) {
    SketchTask task = {};
    task.layout = key_layout, task.value_layout = value_layout;
    task.q = q.data(), task.q_dtype = Dtype::kFloat32;
    task.codes = key_codes.data(), task.ranges = key_ranges.data();
    task.value_codes = value_codes.data(), task.value_ranges = value_ranges.data();
    task.starts = starts, task.lengths = lengths;
    task.num_seqs = num_seqs, task.num_heads = num_heads, task.num_sets = num_sets, task.width = 300;
    task.rest = result.rest.data();
    return task;
  };
  const auto attend_of = [&](Result& result) {
    DecodeTask task = {};
    task.q = q.data(), task.q_dtype = Dtype::kFloat32;
    task.rows = rows.data(), task.row_stride = layout.row_bytes(), task.layout = layout;
    task.slots = result.slots.data(), task.counts = of_seqs.data();
    task.num_seqs = num_seqs, task.num_heads = num_heads, task.num_sets = num_sets, task.num_slots = num_slots;
    task.out = result.attended.data(), task.log_sum_exp = result.log_sum_exp.data();
    return task;
  };
  const auto select_of = [&](Result& result) {
    return SelectTask<float>{nullptr, 0, nullptr, ends.data(), older.data(), counts.data(), num_rows, num_slots, result.positions.data()};
  };
  Result single = room(), step = room();
  std::vector<int32_t> chosen(num_rows);
  workspace.sketch_select(isa, sketch_of(single), select_of(single), nullptr, chosen.data(), single.shares.data(), threads);
  for (int row = 0; row < num_rows; ++row) {
    for (int i = 0; i < counts[row]; ++i) {
      const size_t at = static_cast<size_t>(row) * num_slots + i;
      single.slots[at] = table[row / num_sets * 300 + single.positions[at]];
    }
  }
  workspace.decode(isa, attend_of(single), threads);
  workspace.rest_blend(isa, {num_heads, dim, single.attended.data(), single.out.data(), Dtype::kFloat32, single.shares.data(), single.rest.data()},
                       num_seqs, threads);

  // The new tokens are written again, as they were.
  std::vector<float> new_k, new_v;
  for (const int64_t id : ids) {
    new_k.insert(new_k.end(), k.begin() + id * values, k.begin() + (id + 1) * values);
    new_v.insert(new_v.end(), v.begin() + id * values, v.begin() + (id + 1) * values);
  }
  const SketchStep prepared(isa, {sketch_of(step), attend_of(step), select_of(step), step.slots.data(), ids, ids, table.data(), 300,
                                  nullptr, step.shares.data(), step.out.data()});
  SketchStepper stepper;
  for (int time = 0; time < 2; ++time) {
    stepper.run(prepared, {rows.data(), key_codes.data(), key_ranges.data(), value_codes.data(), value_ranges.data()},
                {q.data(), new_k.data(), new_v.data(), values * 4, values * 4}, threads);
    if (std::memcmp(step.out.data(), single.out.data(), queries * sizeof(float)) != 0 || step.positions != single.positions) return false;
  }
  return true;
}

}  // namespace check
