// Attention of a prompt's tokens, in the manner of flash attention (arXiv 2307.08691): blocks of keys, a running maximum, no
// matrix of scores in memory.
//
// The rows of a KV head's query heads share its packed keys and values. A strip's scores stay in registers, as far as there
// are enough, from the first product to the weights, which go through L1. A row's result depends on the row and on the blocks
// of keys only, not on what shares its tile.
#pragma once

#include <algorithm>
#include <cstring>

#include "prefill_strip.h"

namespace alisa::ALISA_ISA {

constexpr int kStrips = 8;
constexpr int kTile = kRows * kStrips;  // its queries, sums and one packed block fit L1

// The maximum that weights are relative to moves only when a score exceeds it by this power of two: most blocks then
// rescale nothing, and neither float32 sums nor bfloat16 weights lose a bit by it.
constexpr float kSlack = 8.0F;

// The maximum of a row that has seen no key yet: finite, because what a window hides scores minus infinity.
constexpr float kLowest = -1e30F;

struct Scratch {
  uint32_t* q;        // [kTile, words of a head]
  uint32_t* weights;  // [kRows, kKeyWords]
  float* sums;        // [kTile, width]
  float* totals;      // [kTile, kWidth]: partial sums of the weights
  float* maxima;      // [kTile], in powers of two
  int* visible;       // [kTile]: the row sees the keys before this one,
  int* hidden;        // [kTile]: and not those before this one
  size_t* choice;     // [kTile]: where the row's choice of blocks begins in task.chosen

  Scratch(const PrefillTask& task, uint32_t* memory) {
    choice = reinterpret_cast<size_t*>(memory);
    sums = reinterpret_cast<float*>(choice + kTile);
    totals = sums + kTile * task.width();
    weights = reinterpret_cast<uint32_t*>(totals + kTile * kWidth);
    maxima = reinterpret_cast<float*>(weights + kRows * kKeyWords);
    visible = reinterpret_cast<int*>(maxima + kTile);
    hidden = visible + kTile;
    q = reinterpret_cast<uint32_t*>(hidden + kTile);
  }
  static size_t words(const PrefillTask& task) {
    return static_cast<size_t>(kTile) * (task.width() + kWidth + 3 + head_words(task.head_dim)) + kRows * kKeyWords +
           kTile * sizeof(size_t) / sizeof(uint32_t);
  }
};

inline size_t packed_key_words(const PrefillTask& task) { return static_cast<size_t>(head_words(task.head_dim)) * kKeyBlock; }
inline size_t block_words(const PrefillTask& task) { return packed_key_words(task) + static_cast<size_t>(kKeyWords) * task.width(); }

inline void pack(const PrefillTask& task, int kv_head, int block, uint32_t* packed) {
  const int first = block * kKeyBlock;
  const int count = task.num_keys - first < kKeyBlock ? task.num_keys - first : kKeyBlock;
  pack_keys(task.k, kv_head, first, count, task.head_dim, packed);
  pack_values(task.v, kv_head, first, count, task.head_dim, packed + packed_key_words(task));
}

template <int kUsed>
ALISA_INLINE F largest(const F (&x)[kUsed]) {
  F most = x[0];
  for (int i = 1; i < kUsed; ++i) most = vmax(most, x[i]);
  return most;
}

// The row's weights are relative to a larger maximum from here on.
inline void raise_maximum(float* sums, float* totals, float& maximum, float raised, int width) {
  const F scale = exp2_of(set1(maximum - raised));
  for (int i = 0; i < width; i += kWidth) store(sums + i, load(sums + i) * scale);
  store(totals, load(totals) * scale);
  maximum = raised;
}

// Weights of one strip on the first kUsed vectors of keys of a block, as words in scratch.weights. The rows of the bits of
// `skipping` do not read the block: to them all of its keys are hidden.
template <int kUsed>
inline void weigh(const Scratch& scratch, int strip, const uint32_t* keys, int first_key, bool hides, unsigned skipping,
                  int words, int width, F scale, float cap) {
  F scores[kRows][kUsed];
  const int first = strip * kRows;
  products<kUsed>(scratch.q + first * words, keys, words, scores);
  for (int row = 0; row < kRows; ++row) {
    F (&x)[kUsed] = scores[row];
    if (cap > 0.0F) {
      for (int i = 0; i < kUsed; ++i) x[i] = cap_scores(x[i], cap);
    }
    if (hides || skipping != 0) {
      const int end = (skipping >> row & 1U) != 0 ? 0 : scratch.visible[first + row] - first_key;
      const int begin = scratch.hidden[first + row] - first_key;
      for (int i = 0; i < kUsed; ++i) x[i] = seen_only(x[i], begin - i * kWidth, end - i * kWidth);
    }
    float& maximum = scratch.maxima[first + row];
    const F limit = set1(maximum + kSlack);
    const F most = largest(x) * scale;
    float* totals = scratch.totals + (first + row) * kWidth;
    if (any_above(most, limit)) {
      raise_maximum(scratch.sums + (first + row) * width, totals, maximum, max_of(most), width);
    }
    const F negative = set1(-maximum);
    for (int i = 0; i < kUsed; ++i) x[i] = exp2_of(fma(x[i], scale, negative));
    F total = load(totals);
    for (int i = 0; i < kUsed; ++i) total = total + x[i];
    store(totals, total);
    store_weights(x, scratch.weights + row * kKeyWords);
  }
}

// Sums of one strip have grown by weights x values, for kUsed vectors of a head's values.
template <int kUsed>
ALISA_INLINE void add_values(const uint32_t* weights, const uint32_t* values, int key_words, int width, float* sums) {
  F sum[kRows][kUsed];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) sum[row][i] = load(sums + row * width + i * kWidth);
  }
  for (int word = 0; word < key_words; ++word) {
    Operand operand[kUsed];
    for (int i = 0; i < kUsed; ++i) operand[i] = load_operand(values + word * width + i * kWidth);
    for (int row = 0; row < kRows; ++row) {
      const Operand weight = repeat(weights[row * kKeyWords + word]);
      for (int i = 0; i < kUsed; ++i) sum[row][i] = add_products(sum[row][i], weight, operand[i]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) store(sums + row * width + i * kWidth, sum[row][i]);
  }
}

inline void add_all_values(const uint32_t* weights, const uint32_t* values, int key_words, int width, float* sums) {
  int i = 0;
  for (; i + kTogether * kWidth <= width; i += kTogether * kWidth) {
    add_values<kTogether>(weights, values + i, key_words, width, sums + i);
  }
  static_assert(kTogether <= 4, "a case for every number of vectors that are left");
  switch ((width - i) / kWidth) {
    case 3: add_values<kTogether < 4 ? 1 : 3>(weights, values + i, key_words, width, sums + i); break;
    case 2: add_values<kTogether < 3 ? 1 : 2>(weights, values + i, key_words, width, sums + i); break;
    case 1: add_values<1>(weights, values + i, key_words, width, sums + i); break;
    default: break;
  }
}

// Queries of a tile copied to consecutive memory, and what they start from; returns the most keys that a row sees.
inline int open_rows(const PrefillTask& task, int kv_head, int tile, const Scratch& scratch) {
  const int group = task.group();
  const int width = task.width();
  const int rows = task.num_queries * group;
  const int words = head_words(task.head_dim);
  int most = 0;
  for (int i = 0; i < kTile; ++i) {
    const int row = tile * kTile + i;
    uint32_t* query = scratch.q + i * words;
    float* sums = scratch.sums + i * width;
    float* totals = scratch.totals + i * kWidth;
    const size_t token_block = static_cast<size_t>(std::min(row, rows - 1) / group / kQueryBlock);
    scratch.choice[i] = (token_block * task.num_kv_heads + kv_head) * task.chosen_stride;
    for (int j = 0; j < width; j += kWidth) store(sums + j, set1(0.0F));
    store(totals, set1(0.0F));
    scratch.maxima[i] = kLowest;
    if (row >= rows) {
      // Nobody reads what becomes of these.
      for (int word = 0; word < words; ++word) query[word] = 0;
      scratch.visible[i] = scratch.visible[i - 1];
      scratch.hidden[i] = scratch.hidden[i - 1];
      continue;
    }
    const int token = row / group;
    const int head = kv_head * group + row % group;
    copy_query(task.q.at(token, head), task.head_dim, query);
    scratch.visible[i] = std::min(task.num_keys, task.ahead + token + 1);
    scratch.hidden[i] = task.hidden == kNothingHidden ? 0 : token + task.hidden;
    if (scratch.visible[i] > most) most = scratch.visible[i];
    if (task.before != nullptr) {
      const size_t at = static_cast<size_t>(token) * task.num_heads + head;
      std::memcpy(sums, task.before + at * task.head_dim, static_cast<size_t>(task.head_dim) * sizeof(float));
      scratch.maxima[i] = task.log_sum_exp[at] * kLog2E;
      totals[0] = 1.0F;
    }
  }
  return most;
}

inline void close_rows(const PrefillTask& task, int kv_head, int tile, const Scratch& scratch) {
  const int group = task.group();
  const int width = task.width();
  const int rows = task.num_queries * group;
  for (int i = 0; i < kTile && tile * kTile + i < rows; ++i) {
    const int row = tile * kTile + i;
    const size_t at = static_cast<size_t>(row / group) * task.num_heads + kv_head * group + row % group;
    const float total = sum_of(load(scratch.totals + i * kWidth));
    // A row that a window hides all keys from so far counts as one of a weight that is nothing next to any other.
    const bool sees = total > 0.0F;
    const F inverse = set1(sees ? 1.0F / total : 0.0F);
    task.log_sum_exp[at] = sees ? scratch.maxima[i] * kLn2 + __builtin_logf(total) : kLowest;
    for (int j = 0; j < width; j += kWidth) {
      const F mean = load(scratch.sums + i * width + j) * inverse;
      const size_t place = at * task.head_dim + j;
      if (task.after != nullptr) {
        store_first(task.after + place, mean, task.head_dim - j);
      } else {
        store_first(task.out + place, mean, task.head_dim - j);
      }
    }
  }
}

// The rows of a strip, as bits, that do not read this block.
inline unsigned rows_skipping(const PrefillTask& task, const Scratch& scratch, int strip, int block) {
  if (task.chosen == nullptr) return 0;
  constexpr unsigned kAll = (1U << kRows) - 1U;
  const size_t* choice = scratch.choice + strip * kRows;
  const uint8_t* chosen = task.chosen + block;
  if (choice[0] == choice[kRows - 1]) return chosen[choice[0]] != 0 ? 0 : kAll;
  unsigned skipping = 0;
  for (int row = 0; row < kRows; ++row) skipping |= (chosen[choice[row]] != 0 ? 0U : 1U) << row;
  return skipping;
}

inline void attend(const PrefillTask& task, int kv_head, int tile, const uint32_t* packed, uint32_t* memory) {
  const Scratch scratch(task, memory);
  const int words = head_words(task.head_dim);
  const int width = task.width();
  const float root = __builtin_sqrtf(static_cast<float>(task.head_dim));
  const F scale = set1(kLog2E / root);
  const float cap = task.softcap * root;
  const int most = open_rows(task, kv_head, tile, scratch);
  const int least = scratch.hidden[0] > 0 ? scratch.hidden[0] / kKeyBlock * kKeyBlock : 0;
  for (int first = least; first < most; first += kKeyBlock) {
    const uint32_t* keys = packed + static_cast<size_t>(first / kKeyBlock) * block_words(task);
    for (int strip = 0; strip < kStrips; ++strip) {
      // Rows of a strip see ever more keys.
      const int least_seen = scratch.visible[strip * kRows] - first;
      const int most_seen = scratch.visible[strip * kRows + kRows - 1] - first;
      // And of a window, ever later ones.
      const int most_hidden = scratch.hidden[strip * kRows + kRows - 1] - first;
      if (most_seen <= 0 || scratch.hidden[strip * kRows] - first >= kKeyBlock) continue;
      const bool hides = least_seen < kKeyBlock || most_hidden > 0;
      const unsigned skipping = rows_skipping(task, scratch, strip, first / kKeyBlock);
      if (skipping == (1U << kRows) - 1U) continue;
      if (most_seen > kKeyBlock / 2) {
        weigh<kVectors>(scratch, strip, keys, first, hides, skipping, words, width, scale, cap);
      } else {
        weigh<kVectors / 2>(scratch, strip, keys, first, hides, skipping, words, width, scale, cap);
      }
      const int key_words = most_seen > kKeyBlock / 2 ? kKeyWords : kKeyWords / 2;
      add_all_values(scratch.weights, keys + packed_key_words(task), key_words, width, scratch.sums + strip * kRows * width);
    }
  }
  close_rows(task, kv_head, tile, scratch);
}

}  // namespace alisa::ALISA_ISA
