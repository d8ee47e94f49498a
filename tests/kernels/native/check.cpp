// The native code without Python, for the sanitizers: every instruction set, row dtype and awkward shape, on buffers of
// exactly the size that is needed, so that a read or a write one byte beyond is seen. Results are compared with a plain
// loop in double precision.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "check_step.h"
#include "fixed_attention.h"
#include "products.h"
#include "stack.h"
#include "workspace.h"
#include "select.h"

namespace {

using namespace alisa;

const Threads kTwo = {nullptr, 2, nullptr, nullptr};

int failures = 0;

void expect(bool holds, const char* what, const char* isa, const RowLayout& layout) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s, dtype %d, %d heads of %d\n", isa, what, static_cast<int>(layout.dtype), layout.num_kv_heads,
               layout.head_dim);
  ++failures;
}

// Exactly `size` bytes on the heap, so that the sanitizer guards both ends.
template <class T>
struct Exact {
  explicit Exact(size_t count) : data(new T[count]()), size(count) {}
  std::unique_ptr<T[]> data;
  size_t size;
  T* get() { return data.get(); }
  T& operator[](size_t i) { return data[i]; }
};

double half_value(const uint8_t* bytes) {
  const int half = bytes[0] | bytes[1] << 8;
  const int exponent = half >> 10 & 31;
  const double mantissa = half & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Dimension `dim` of head `g` of K (half 0) or V (half 1).
double value_at(const RowLayout& layout, const uint8_t* row, int half, int g, int dim) {
  const alisa::HalfLayout of_half = half ? layout.values() : layout.keys();
  const uint8_t* head = row + half * layout.values_at() + g * of_half.head_bytes();
  if (layout.dtype == Dtype::kFloat32) {
    float value;
    __builtin_memcpy(&value, head + 4 * dim, 4);
    return value;
  }
  if (layout.dtype == Dtype::kBFloat16) {
    const uint32_t raw = static_cast<uint32_t>(head[2 * dim] | head[2 * dim + 1] << 8) << 16;
    float value;
    __builtin_memcpy(&value, &raw, 4);
    return value;
  }
  if (layout.dtype == Dtype::kFloat16) return half_value(head + 2 * dim);
  const int part = dim / of_half.part_dim(), of_part = dim % of_half.part_dim(), plane = of_half.plane_len();
  const uint8_t* pair = row + layout.pairs_at() + 4 * (half * layout.num_pairs() + g * layout.parts + part);
  const uint8_t* codes = head + part * of_half.part_bytes();
  const bool high = of_half.dtype == Dtype::kInt4 && of_part >= plane;
  const int code = of_half.dtype == Dtype::kInt8 ? codes[of_part] : high ? codes[of_part - plane] >> 4 : codes[of_part] & 15;
  return half_value(pair + 2) + half_value(pair) * code;
}

void check_decode(const Isa& isa, const RowLayout& layout, int group, bool per_head, std::mt19937& random) {
  const int num_rows = 150;
  const int num_seqs = 3;
  const int num_sets = per_head ? layout.num_kv_heads : 1;
  const int num_heads = layout.num_kv_heads * group;
  const int dim = layout.head_dim;
  std::normal_distribution<float> normal;
  Exact<float> k(static_cast<size_t>(num_rows) * layout.num_kv_heads * dim), v(k.size);
  for (size_t i = 0; i < k.size; ++i) k[i] = normal(random), v[i] = normal(random);
  Exact<uint8_t> rows(num_rows * layout.row_bytes());
  Exact<int64_t> order(num_rows);
  for (int i = 0; i < num_rows; ++i) order[i] = i;
  const size_t token_bytes = static_cast<size_t>(layout.num_kv_heads) * dim * 4;
  Workspace workspace;
  const Threads threads{nullptr, 3};
  workspace.encode(isa, {k.get(), v.get(), Dtype::kFloat32, token_bytes, token_bytes, rows.get(), layout.row_bytes(), layout,
                         order.get()},
                   num_rows, threads);

  Exact<int32_t> counts(num_seqs);
  counts[0] = 1;
  counts[1] = num_rows;
  counts[2] = 67;
  Exact<int32_t> slots(static_cast<size_t>(num_seqs) * num_sets * num_rows);
  for (size_t set = 0; set < slots.size; set += num_rows) {
    for (int i = 0; i < num_rows; ++i) slots[set + i] = static_cast<int32_t>((i * 7 + set) % num_rows);
  }
  Exact<float> q(static_cast<size_t>(num_seqs) * num_heads * dim), out(q.size), mass(slots.size);
  Exact<float> log_sum_exp(static_cast<size_t>(num_seqs) * num_heads);
  for (size_t i = 0; i < q.size; ++i) q[i] = normal(random);
  DecodeTask task = {};
  task.q = q.get();
  task.q_dtype = Dtype::kFloat32;
  task.rows = rows.get();
  task.row_stride = layout.row_bytes();
  task.layout = layout;
  task.slots = slots.get();
  task.counts = counts.get();
  task.num_seqs = num_seqs;
  task.num_heads = num_heads;
  task.num_sets = num_sets;
  task.num_slots = num_rows;
  task.out = out.get();
  task.mass = mass.get();
  task.log_sum_exp = log_sum_exp.get();
  workspace.decode(isa, task, threads);

  if (!per_head) {
    // The same a block at a time, in each sequence its own way.
    const std::vector<float> whole_out(out.get(), out.get() + out.size), whole_mass(mass.get(), mass.get() + mass.size);
    Pieces pieces;
    Exact<int32_t> begins(num_seqs), ends(num_seqs);
    for (int piece = 0; piece < 3; ++piece) {
      for (int seq = 0; seq < num_seqs; ++seq) {
        begins[seq] = piece == 0 ? 0 : ends[seq];
        ends[seq] = std::min(counts[seq], (piece + seq) * kBlock);
        if (piece == 2) ends[seq] = counts[seq];
      }
      workspace.decode_piece(isa, task, pieces, begins.get(), ends.get(), threads);
    }
    for (size_t i = 0; i < out.size; ++i) out[i] = 0;
    workspace.decode_end(isa, task, pieces, threads);
    expect(std::equal(whole_out.begin(), whole_out.end(), out.get()), "output in pieces", isa.name, layout);
    expect(std::equal(whole_mass.begin(), whole_mass.end(), mass.get()), "mass in pieces", isa.name, layout);
  }

  for (int seq = 0; seq < num_seqs; ++seq) {
    double total_mass = 0;
    for (int i = 0; i < num_sets * num_rows; ++i) total_mass += mass[static_cast<size_t>(seq) * num_sets * num_rows + i];
    expect(std::fabs(total_mass - num_heads) < 1e-4 * num_heads, "mass", isa.name, layout);
    for (int h = 0; h < num_heads; ++h) {
      const int g = h / group;
      const int32_t* chosen = slots.get() + (static_cast<size_t>(seq) * num_sets + (per_head ? g : 0)) * num_rows;
      std::vector<double> expected(dim);
      double total = 0;
      for (int i = 0; i < counts[seq]; ++i) {
        const uint8_t* row = rows.get() + chosen[i] * layout.row_bytes();
        double score = 0;
        for (int d = 0; d < dim; ++d) {
          score += value_at(layout, row, 0, g, d) * q[(static_cast<size_t>(seq) * num_heads + h) * dim + d];
        }
        const double weight = std::exp(score / std::sqrt(dim));
        total += weight;
        for (int d = 0; d < dim; ++d) expected[d] += weight * value_at(layout, row, 1, g, d);
      }
      expect(std::fabs(log_sum_exp[static_cast<size_t>(seq) * num_heads + h] - std::log(total)) < 1e-4, "log-sum-exp",
             isa.name, layout);
      for (int d = 0; d < dim; ++d) {
        const double got = out[(static_cast<size_t>(seq) * num_heads + h) * dim + d];
        expect(std::fabs(got - expected[d] / total) < 1e-4, "out", isa.name, layout);
      }
    }
  }
}

// Code `dim` of a sketched head, and the key it stands for.
double sketched_value(const SketchLayout& layout, const uint8_t* codes, const uint16_t* range, int dim) {
  const int code = codes[dim % layout.code_bytes()] >> dim / layout.code_bytes() * layout.bits & ((1 << layout.bits) - 1);
  uint8_t bytes[4];
  __builtin_memcpy(bytes, range, 4);
  return half_value(bytes + 2) + half_value(bytes) * code;
}

void check_sketch(const Isa& isa, const SketchLayout& layout, int group, bool per_head, std::mt19937& random) {
  const int num_tokens = 100;
  const int num_seqs = 3;
  const int num_sets = per_head ? layout.num_kv_heads : 1;
  const int num_heads = layout.num_kv_heads * group;
  const int dim = layout.head_dim;
  const RowLayout place = {Dtype::kFloat32, layout.num_kv_heads, dim};  // for messages
  std::normal_distribution<float> normal;
  Exact<float> keys(static_cast<size_t>(num_tokens) * layout.num_kv_heads * dim);
  for (size_t i = 0; i < keys.size; ++i) keys[i] = normal(random);
  Exact<uint8_t> codes(static_cast<size_t>(num_tokens) * layout.num_kv_heads * layout.code_bytes());
  Exact<uint16_t> ranges(static_cast<size_t>(num_tokens) * layout.num_kv_heads * 2);
  Exact<int64_t> ids(num_tokens), starts(num_seqs);
  for (int i = 0; i < num_tokens; ++i) ids[i] = num_tokens - 1 - i;
  Workspace workspace;
  const Threads threads{nullptr, 3};
  const size_t token_values = static_cast<size_t>(layout.num_kv_heads) * dim;
  workspace.sketch_append(isa, {layout, keys.get(), Dtype::kFloat32, token_values * 4, codes.get(), ranges.get(), ids.get()},
                          num_tokens, threads);
  for (int i = 0; i < num_tokens; ++i) {
    for (int g = 0; g < layout.num_kv_heads; ++g) {
      const size_t at = static_cast<size_t>(ids[i]) * layout.num_kv_heads + g;
      uint8_t bytes[4];
      __builtin_memcpy(bytes, ranges.get() + 2 * at, 4);
      for (int d = 0; d < dim; ++d) {
        const double error = sketched_value(layout, codes.get() + at * layout.code_bytes(), ranges.get() + 2 * at, d) -
                             keys[i * token_values + g * dim + d];
        expect(std::fabs(error) <= half_value(bytes) * 0.51 + 0.01, "sketched key", isa.name, place);
      }
    }
  }

  Exact<int32_t> lengths(num_seqs);
  lengths[0] = 1, lengths[1] = 33, lengths[2] = 66;
  starts[0] = 7, starts[1] = 0, starts[2] = num_tokens - 66;
  const int width = 67;
  Exact<float> q(static_cast<size_t>(num_seqs) * num_heads * dim), out(static_cast<size_t>(num_seqs) * num_sets * width);
  for (size_t i = 0; i < q.size; ++i) q[i] = normal(random);
  SketchTask task = {};
  task.layout = layout;
  task.q = q.get();
  task.q_dtype = Dtype::kFloat32;
  task.codes = codes.get();
  task.ranges = ranges.get();
  task.starts = starts.get();
  task.lengths = lengths.get();
  task.num_seqs = num_seqs;
  task.num_heads = num_heads;
  task.num_sets = num_sets;
  task.width = width;
  task.out = out.get();
  workspace.sketch_scores(isa, task, threads);
  const auto value_at = [&](int seq, int t, int g, int d) {
    const size_t at = static_cast<size_t>(starts[seq] + t) * layout.num_kv_heads + g;
    return sketched_value(layout, codes.get() + at * layout.code_bytes(), ranges.get() + 2 * at, d);
  };
  const auto weights_of = [&](int seq, int h) {
    std::vector<double> weights(lengths[seq]);
    double total = 0;
    for (int t = 0; t < lengths[seq]; ++t) {
      double score = 0;
      for (int d = 0; d < dim; ++d) {
        score += value_at(seq, t, h / group, d) * q[(static_cast<size_t>(seq) * num_heads + h) * dim + d];
      }
      total += weights[t] = std::exp(score / std::sqrt(dim));
    }
    for (double& weight : weights) weight /= total;
    return weights;
  };
  for (int seq = 0; seq < num_seqs; ++seq) {
    std::vector<double> expected(static_cast<size_t>(num_sets) * width);
    for (int h = 0; h < num_heads; ++h) {
      const std::vector<double> weights = weights_of(seq, h);
      for (int t = 0; t < lengths[seq]; ++t) expected[(per_head ? h / group : 0) * width + t] += weights[t];
    }
    for (int i = 0; i < num_sets * width; ++i) {
      expect(std::fabs(out[static_cast<size_t>(seq) * num_sets * width + i] - expected[i]) < 1e-3, "weight", isa.name, place);
    }
  }

  // Half of the older tokens and the last one: the shares of the heads of a set add up to the weight of what it reads.
  const int num_rows = num_seqs * num_sets;
  const int num_slots = 35;
  Exact<int32_t> ends(num_rows), older(num_rows), counts(num_rows), positions(static_cast<size_t>(num_rows) * num_slots);
  Exact<float> shares(static_cast<size_t>(num_seqs) * num_heads);
  for (int row = 0; row < num_rows; ++row) {
    ends[row] = lengths[row / num_sets] - 1;
    older[row] = ends[row] / 2;
    counts[row] = older[row] + 1;
  }
  // The keys stand for the values as well.
  Exact<float> rest(q.size);
  task.value_layout = layout;
  task.value_codes = codes.get();
  task.value_ranges = ranges.get();
  task.rest = rest.get();
  workspace.sketch_select(isa, task,
                          {nullptr, 0, nullptr, ends.get(), older.get(), counts.get(), num_rows, num_slots, positions.get()},
                          nullptr, counts.get(), shares.get(), threads);
  for (int row = 0; row < num_rows; ++row) {
    double missing = 0;
    for (int i = 0; i < counts[row]; ++i) missing += out[static_cast<size_t>(row) * width + positions[row * num_slots + i]];
    const int set_heads = num_heads / num_sets;
    for (int h = 0; h < set_heads; ++h) missing -= shares[row * set_heads + h];
    expect(std::fabs(missing) < 1e-3, "share", isa.name, place);
  }
  for (int seq = 0; seq < num_seqs; ++seq) {
    for (int h = 0; h < num_heads; ++h) {
      std::vector<double> weights = weights_of(seq, h);
      const int row = seq * num_sets + (per_head ? h / group : 0);
      for (int i = 0; i < counts[row]; ++i) weights[positions[row * num_slots + i]] = 0;
      for (int d = 0; d < dim; ++d) {
        double expected = 0;
        for (int t = 0; t < lengths[seq]; ++t) expected += weights[t] * value_at(seq, t, h / group, d);
        const double error = rest[(static_cast<size_t>(seq) * num_heads + h) * dim + d] - expected;
        expect(std::fabs(error) < 3e-3, "rest", isa.name, place);
      }
    }
  }
}

uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

double bfloat16_value(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Two blocks of `num` tokens: everything in the first, causal in the second; then the weights on the first.
void check_prefill(const PrefillIsa& isa, int num, int dim, int kv_heads, int group, std::mt19937& random) {
  const int heads = kv_heads * group;
  const RowLayout place = {Dtype::kBFloat16, kv_heads, dim};
  std::normal_distribution<float> normal;
  const auto filled = [&](size_t count) {
    Exact<uint16_t> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = bfloat16_bits(normal(random));
    return values;
  };
  const size_t token = static_cast<size_t>(kv_heads) * dim;
  Exact<uint16_t> q = filled(num * token * group), out(num * token * group);
  Exact<uint16_t> past_k = filled(num * token), past_v = filled(num * token), k = filled(num * token), v = filled(num * token);
  Exact<float> between(num * token * group), log_sum_exp(static_cast<size_t>(num) * heads);
  const auto strided = [&](const Exact<uint16_t>& x, size_t token_stride) {
    return Heads{x.data.get(), token_stride, static_cast<size_t>(dim)};
  };
  const size_t d = static_cast<size_t>(dim);
  Workspace workspace;
  const Threads threads{nullptr, 3};
  PrefillTask task = {strided(q, heads * d), strided(past_k, token), strided(past_v, token), num, num, heads, kv_heads, dim,
                      num,   kNothingHidden, 0.0F, nullptr, between.get(), nullptr, log_sum_exp.get(), nullptr, 0};
  workspace.prefill(isa, task, threads);
  task.k = strided(k, token), task.v = strided(v, token), task.ahead = 0;
  task.before = between.get(), task.after = nullptr, task.out = out.get();
  workspace.prefill(isa, task, threads);
  Exact<float> mass(static_cast<size_t>(num) * num);
  workspace.prefill_mass(isa, {task.q, strided(past_k, token), num, num, heads, kv_heads, dim, 1, num, 0.0F, log_sum_exp.get(), mass.get()},
                         threads);

  for (int t = 0; t < num; ++t) {
    double missing = 0;
    for (int i = 0; i < num; ++i) missing += mass[static_cast<size_t>(t) * num + i];
    for (int h = 0; h < heads; ++h) {
      const size_t at = (static_cast<size_t>(t) * heads + h) * d;
      const size_t head = static_cast<size_t>(h / group) * d;
      std::vector<double> weights(num + t + 1);
      double total = 0;
      double past = 0;
      for (int i = 0; i < num + t + 1; ++i) {
        const uint16_t* key = (i < num ? past_k.get() + i * token : k.get() + (i - num) * token) + head;
        double score = 0;
        for (int j = 0; j < dim; ++j) score += bfloat16_value(q[at + j]) * bfloat16_value(key[j]);
        total += weights[i] = std::exp(score / std::sqrt(dim));
        if (i < num) past += weights[i];
      }
      missing -= past / total;
      expect(std::fabs(std::log(total) - log_sum_exp[at / d]) < 1e-4, "log-sum-exp", "prefill", place);
      for (int j = 0; j < dim; ++j) {
        double sum = 0;
        for (int i = 0; i < num + t + 1; ++i) {
          sum += weights[i] / total * bfloat16_value((i < num ? past_v.get() + i * token : v.get() + (i - num) * token)[head + j]);
        }
        // Weights and result are bfloat16, values below 6.
        expect(std::fabs(sum - bfloat16_value(out[at + j])) < 0.04, "output", "prefill", place);
      }
    }
    expect(std::fabs(missing) < 1e-3, "mass", "prefill", place);
  }
}

// Queries that all look for the third of six blocks of keys: their two blocks read it, and what else they read in any case.
void check_choice(const PrefillIsa& isa, int dim, int kv_heads, int group, std::mt19937& random) {
  const int heads = kv_heads * group, num_keys = 6 * kKeyBlock, num = 2 * kQueryBlock;
  const RowLayout place = {Dtype::kBFloat16, kv_heads, dim};
  std::normal_distribution<float> normal;
  const size_t d = static_cast<size_t>(dim), token = kv_heads * d;
  Exact<uint16_t> q(num * token * group), k(num_keys * token), means(6 * token), out(q.size), all(q.size);
  for (size_t i = 0; i < q.size; ++i) q[i] = bfloat16_bits(2 + normal(random));
  for (size_t i = 0; i < k.size; ++i) k[i] = bfloat16_bits((i / token / kKeyBlock == 2 ? 2 : -2) + normal(random));
  const Heads queries{q.get(), heads * d, d}, keys{k.get(), token, d};
  Workspace workspace;
  const Threads threads{nullptr, 3};
  workspace.prefill_means(isa, {keys, 6, kv_heads, dim, means.get()}, threads);
  for (int i = 0; i < 6; ++i) {
    const double mean = bfloat16_value(means[i * token]);
    expect(std::fabs(mean - (i == 2 ? 2 : -2)) < 0.8, "mean", "prefill", place);
  }
  Exact<uint8_t> chosen(static_cast<size_t>(2) * kv_heads * 6);
  std::memset(chosen.get(), 1, chosen.size);
  workspace.prefill_choose(isa, {queries, {means.get(), token, d}, num, 4, heads, kv_heads, dim, 0.0F, 0.5F, chosen.get(), 6}, threads);
  for (int i = 0; i < kv_heads; ++i) {
    for (int block = 0; block < 2; ++block) {
      const uint8_t* mine = chosen.get() + static_cast<size_t>(block * kv_heads + i) * 6;
      expect(mine[0] == 1 && mine[2] == 1 && mine[3] == 1 && mine[4] == 1, "what is read", "prefill", place);
      expect(mine[1] == 0, "what is not read", "prefill", place);
    }
  }
  Exact<float> log_sum_exp(static_cast<size_t>(num) * heads);
  PrefillTask task = {queries, keys, keys, num, num_keys, heads, kv_heads, dim, num_keys - num, kNothingHidden, 0.0F,
                      nullptr, nullptr, out.get(), log_sum_exp.get(), chosen.get(), 6};
  workspace.prefill(isa, task, threads);
  task.chosen = nullptr, task.out = all.get();
  workspace.prefill(isa, task, threads);
  for (size_t i = 0; i < out.size; ++i) {
    // A key of the block that is not read has about e^(-8 * sqrt(dim)) of the weight of one that all look for.
    expect(std::fabs(bfloat16_value(out[i]) - bfloat16_value(all[i])) < 0.1, "chosen", "prefill", place);
  }
}

// An MLP's activation with its gate, on widths around a run and a vector.
void check_activation(const Isa& isa, Activation kind, int width, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int num = 3;
  Exact<float> x(static_cast<size_t>(num) * 2 * width), out(static_cast<size_t>(num) * width);
  for (size_t i = 0; i < x.size; ++i) x[i] = 3 * normal(random);
  activate(isa, {kind, Dtype::kFloat32, x.get(), out.get(), width, true, num}, kTwo);
  for (int n = 0; n < num; ++n) {
    for (int i = 0; i < width; ++i) {
      const double value = x[static_cast<size_t>(2 * n) * width + i];
      const double cubic = std::sqrt(8 / M_PI) * (value + 0.044715 * value * value * value);
      const double found = out[static_cast<size_t>(n) * width + i];
      double activated = value / (1 + std::exp(-(kind == Activation::kSilu ? value : cubic)));
      if (kind == Activation::kGelu) activated = value / 2 * (1 + std::erf(value / std::sqrt(2.0)));
      if (kind == Activation::kRelu) activated = std::max(value, 0.0);
      const double expected = activated * x[static_cast<size_t>(2 * n + 1) * width + i];
      expect(std::fabs(found - expected) < 1e-5 * (1 + std::fabs(expected)), "activation", isa.name, {});
    }
  }
}

void check_select() {
  const int capacity = 300;
  Exact<double> scores(2 * capacity);
  for (int i = 0; i < 2 * capacity; ++i) scores[i] = (i * 37 % 100) / 8;
  Exact<int64_t> starts(1);
  starts[0] = 1;
  Exact<int32_t> ends(1), older(1), counts(1), positions(52);
  ends[0] = capacity - 10;
  older[0] = 40;
  counts[0] = 50;
  select_positions<double>({scores.get(), capacity, starts.get(), ends.get(), older.get(), counts.get(), 1, 52, positions.get()},
                           kTwo);
  for (int i = 1; i < 50; ++i) expect(positions[i] > positions[i - 1], "ascending", "select", {});
  expect(positions[50] == 0 && positions[51] == 0, "padding", "select", {});
}

// A weight whose every number is known, and the memory behind it.
struct Weight {
  Weight(WeightFormat format, int num_in, int num_out, std::mt19937& random)
      : matrix{format, nullptr, nullptr, nullptr, nullptr, num_in, num_out, 1},
        codes(static_cast<size_t>(matrix.panels()) * matrix.panel_bytes()),
        ranges(static_cast<size_t>(matrix.panels()) * matrix.spans() * 2 * kLanes), scales(num_out), bias(num_out) {
    std::uniform_int_distribution<int> number(-7, 8);
    std::memset(codes.get(), format == WeightFormat::kInt8 ? 128 : 0, codes.size);
    for (size_t i = 0; i < ranges.size; ++i) ranges[i] = i / kLanes % 2 == 0 ? 0x3c00 : 0xc700;  // 1, -7
    for (int n = 0; n < num_out; ++n) {
      scales[n] = 1;
      bias[n] = static_cast<float>(n);
      for (int k = 0; k < num_in; ++k) set(n, k, number(random));
    }
    matrix.codes = codes.get();
    matrix.ranges = ranges.get();
    matrix.scales = scales.get();
    matrix.bias = bias.get();
  }

  void set(int n, int k, int value) {
    const int inputs = matrix.inputs_per_step();
    const size_t step = (static_cast<size_t>(n / kLanes) * matrix.steps() + k / inputs) * kLanes + n % kLanes;
    uint8_t* place = codes.get() + step * kStepBytes;
    const auto exact = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &exact, sizeof(bits));
    const auto half = static_cast<uint16_t>(bits >> 16);
    switch (matrix.format) {
      case WeightFormat::kFloat32: std::memcpy(place, &exact, sizeof(exact)); break;
      case WeightFormat::kBFloat16: std::memcpy(place + k % 2 * 2, &half, sizeof(half)); break;
      case WeightFormat::kInt8: place[k % 4] = static_cast<uint8_t>(128 + value); break;
      default: place[k % 4] = static_cast<uint8_t>(place[k % 4] | (value + 7) << (k % 8 / 4 * 4)); break;
    }
    values[{n, k}] = value;
  }

  Matrix matrix;
  Exact<uint8_t> codes;
  Exact<uint16_t> ranges;
  Exact<float> scales, bias;
  std::map<std::pair<int, int>, int> values;
};

// Whole numbers whose groups have steps of 1: products are exact in every format.
void check_product(const ModelIsa& isa, WeightFormat format, int num_tokens, int num_in, int num_out, std::mt19937& random) {
  std::uniform_int_distribution<int> code(-127, 127);
  Weight weight(format, num_in, num_out, random);
  Exact<float> x(static_cast<size_t>(num_tokens) * num_in);
  Exact<float> out(static_cast<size_t>(num_tokens) * num_out);
  for (size_t i = 0; i < x.size; ++i) x[i] = static_cast<float>(i % num_in % kGroup ? code(random) : 127);
  ProductWorkspace workspace;
  workspace.multiply(isa, weight.matrix, Dtype::kFloat32, x.get(), static_cast<size_t>(num_in) * sizeof(float), num_tokens,
                     Dtype::kFloat32, out.get(), kTwo);
  for (int m = 0; m < num_tokens; ++m) {
    for (int n = 0; n < num_out; ++n) {
      double exact = n;
      for (int k = 0; k < num_in; ++k) exact += static_cast<double>(x[static_cast<size_t>(m) * num_in + k]) * weight.values[{n, k}];
      expect(exact == out[static_cast<size_t>(m) * num_out + n], "product", isa.name, {Dtype::kFloat32, num_out, num_in});
    }
  }
}

// Layers of every wiring run within their memory, and every number of tokens gives a token the same.
struct Heads {
  int query, kv, dim;
};
struct Values {
  const uint16_t* at;
  size_t count;
};

// All layers in one call against one call for each part: every token reads its own row and those before it.
void check_whole_step(Stack& stack, const StackStep& step, const Heads& heads, const Values& begun) {
  const Isa& isa = *find_isa("portable");
  const auto tokens = static_cast<size_t>(step.num_tokens);
  const RowLayout layout = {Dtype::kBFloat16, heads.kv, heads.dim, 1};
  Exact<uint8_t> first(tokens * layout.row_bytes()), second(first.size);
  Exact<int64_t> own(tokens);
  Exact<int32_t> slots(tokens * tokens), counts(tokens);
  for (size_t token = 0; token < tokens; ++token) {
    own[token] = static_cast<int64_t>(token);
    counts[token] = static_cast<int32_t>(token + 1);
    for (size_t i = 0; i < tokens; ++i) slots[token * tokens + i] = static_cast<int32_t>(i);
  }
  Exact<uint16_t> out(tokens * static_cast<size_t>(heads.query * heads.dim));
  Exact<float> log_sum_exp(tokens * static_cast<size_t>(heads.query));
  const size_t half = static_cast<size_t>(heads.kv) * heads.dim * 2;
  auto* keys = static_cast<uint8_t*>(step.kv);
  const EncodeTask rows = {keys, keys + half, Dtype::kBFloat16, 2 * half, 2 * half, nullptr, layout.row_bytes(), layout, own.get()};
  DecodeTask task = {};
  task.q = step.q;
  task.q_dtype = Dtype::kBFloat16;
  task.row_stride = layout.row_bytes();
  task.layout = layout;
  task.slots = slots.get();
  task.counts = counts.get();
  task.num_seqs = static_cast<int>(tokens);
  task.num_heads = heads.query;
  task.num_sets = 1;
  task.num_slots = static_cast<int>(tokens);
  task.out = out.get();
  task.log_sum_exp = log_sum_exp.get();
  Workspace workspace;
  FixedAttention attention(workspace, isa, rows, step.num_tokens, task, {first.get(), second.get()});
  auto* x = static_cast<uint16_t*>(step.x);
  const auto* normed = static_cast<const uint16_t*>(step.normed);
  std::copy_n(begun.at, begun.count, x);
  stack.run(step, -1, nullptr, nullptr, kTwo);
  for (const int layer : {0, 1}) stack.run(step, layer, attention.attend(layer, kTwo), nullptr, kTwo);
  const std::vector<uint16_t> expected(normed, normed + begun.count);
  std::copy_n(begun.at, begun.count, x);
  stack.run_all(step, attention, kTwo);
  expect(std::equal(expected.begin(), expected.end(), normed), "all layers in one call", isa.name, layout);
}

void check_stack(const ModelIsa& isa, WeightFormat format, bool gated, bool parallel, bool after_sum, std::mt19937& random) {
  const int hidden = 70, heads = 6, kv_heads = 2, dim = 10, ffn = 100, most = 130;
  Weight q(format, hidden, heads * dim, random), kv(format, hidden, 2 * kv_heads * dim, random);
  Weight out(format, heads * dim, hidden, random), down(format, ffn, hidden, random);
  Weight up(format, hidden, ffn, random), both(format, hidden, 2 * 128, random);
  both.matrix.parts = 2;
  Weight wide_down(format, 128, hidden, random);
  Exact<float> norm_weight(hidden), norm_bias(hidden), head_weight(dim);
  for (int i = 0; i < hidden; ++i) norm_weight[i] = norm_bias[i] = 0.5F;
  for (int i = 0; i < dim; ++i) head_weight[i] = 1.0F;
  const Norm norm = {norm_weight.get(), norm_bias.get(), hidden, 1e-5F};
  const Norm rms = {norm_weight.get(), nullptr, hidden, 1e-5F};
  const Norm head = {head_weight.get(), nullptr, dim, 1e-5F};
  const Norm none = {};
  const LayerWeights layer = {norm, after_sum ? none : rms, norm, none, head, head, q.matrix, kv.matrix, out.matrix,
                              gated ? both.matrix : up.matrix, gated ? wide_down.matrix : down.matrix, true, 0};
  const StackShape shape = {Dtype::kBFloat16, hidden, heads, kv_heads, dim, gated ? 128 : ffn, Activation::kGelu, after_sum,
                            parallel, 0.5F, 2.0F, norm};
  Exact<float> cos(static_cast<size_t>(most) * 6), sin(static_cast<size_t>(most) * 6);
  for (size_t i = 0; i < cos.size; ++i) cos[i] = sin[i] = 0.7F;
  std::uniform_int_distribution<int> bits(0x3e00, 0x4000);
  std::vector<uint16_t> begun(static_cast<size_t>(most) * hidden), found(static_cast<size_t>(most) * heads * dim);
  for (uint16_t& value : begun) value = static_cast<uint16_t>(bits(random));
  for (uint16_t& value : found) value = static_cast<uint16_t>(bits(random));
  std::vector<uint16_t> expected;
  Stack stack(isa, shape, {layer, layer});
  for (const int tokens : {most, 1, 3, 97}) {
    Exact<uint16_t> x(static_cast<size_t>(tokens) * hidden), normed(static_cast<size_t>(tokens) * hidden);
    Exact<uint16_t> queries(static_cast<size_t>(tokens) * heads * dim), keys(static_cast<size_t>(tokens) * 2 * kv_heads * dim);
    std::copy_n(begun.data(), x.size, x.get());
    const StackStep step = {tokens, x.get(), normed.get(), queries.get(), keys.get(), {{cos.get(), sin.get(), 6}}};
    for (const int after : {-1, 0, 1}) stack.run(step, after, found.data(), nullptr, kTwo);
    if (expected.empty()) expected.assign(normed.get(), normed.get() + normed.size);
    expect(std::equal(normed.get(), normed.get() + normed.size, expected.data()), "stack", isa.name, {});
    Exact<uint16_t> again(keys.size);
    stack.project_kv(1, normed.get(), nullptr, tokens, again.get(), kTwo);
    check_whole_step(stack, step, {heads, kv_heads, dim}, {begun.data(), x.size});
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const char* name : {"avx512_vnni", "avx512", "avx2", "portable"}) {
    const Isa* isa = find_isa(name);
    if (isa == nullptr) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    for (const Activation kind : {Activation::kSilu, Activation::kGeluTanh, Activation::kGelu, Activation::kRelu}) {
      for (const int width : {1, 15, 16, 17, 511, 512, 513}) check_activation(*isa, kind, width, random);
    }
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kInt8, Dtype::kInt4,
                              Dtype::kK8V4}) {
      for (const int dim : {1, 7, 16, 33, 64, 80, 192}) {
        for (const int group : {1, 2, 3, 5}) {
          for (const bool per_head : {false, true}) {
            const bool of_4_bits = dtype == Dtype::kInt4 || dtype == Dtype::kK8V4;
            const RowLayout layout = {dtype, 3, dim, of_4_bits && dim > 64 && dim % 64 == 0 ? dim / 64 : 1};
            check_decode(*isa, layout, group, per_head, random);
            expect(check::step_agrees(*isa, {layout, group, per_head}, random), "one call", isa->name, layout);
          }
        }
      }
    }
    for (const int bits : {2, 4, 8}) {
      for (const int dim : {1, 7, 16, 33, 64, 80, 136}) {
        for (const int group : {1, 4, 5}) {
          for (const bool per_head : {false, true}) check_sketch(*isa, {bits, 3, dim}, group, per_head, random);
        }
      }
    }
    std::printf("%s: checked\n", name);
  }
  for (const char* name : {"avx512_bf16", "avx512_vnni", "avx2", "portable"}) {
    const ModelIsa* isa = find_model_isa(name);
    if (isa == nullptr) continue;
    for (const WeightFormat format :
         {WeightFormat::kFloat32, WeightFormat::kBFloat16, WeightFormat::kInt8, WeightFormat::kInt4}) {
      for (const int num_tokens : {1, 2, 5, 7, 24, 97}) {
        for (const int num_in : {1, 33, 64, 131}) {
          for (const int num_out : {1, 64, 65, 200}) check_product(*isa, format, num_tokens, num_in, num_out, random);
        }
      }
      for (const bool gated : {false, true}) {
        for (const bool parallel : {false, true}) check_stack(*isa, format, gated, parallel, !parallel && gated, random);
      }
    }
    std::printf("%s: layers checked\n", name);
  }
  for (const char* name : {"avx512_bf16", "avx2"}) {
    const PrefillIsa* isa = find_prefill(name);
    if (isa == nullptr) continue;
    for (const int num : {1, 65, 100}) {
      for (const int dim : {1, 33, 64, 80}) {
        for (const int group : {1, 3}) check_prefill(*isa, num, dim, 2, group, random);
      }
    }
    for (const int dim : {33, 64}) {
      for (const int group : {1, 3}) check_choice(*isa, dim, 2, group, random);
    }
    std::printf("%s: prefill checked\n", name);
  }
  check_select();
  return failures ? 1 : 0;
}
