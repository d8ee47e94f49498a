// Attention of a prompt's tokens, in the manner of flash attention (arXiv 2307.08691): blocks of keys, a running maximum, no
// matrix of scores in memory.
//
// The rows of a KV head's query heads share its packed keys and values. The 24 vectors of a strip's scores stay in registers
// from the first product to the weights, which go through L1 as bfloat16. A row's result depends on the row and on the blocks
// of keys only, not on what shares its tile.
#pragma once

#include <algorithm>
#include <cstring>

#include "prefill_pack.h"

namespace alisa::avx512_bf16 {

constexpr int kStrips = 8;
constexpr int kTile = kRows * kStrips;  // its queries, sums and one packed block fit L1

// The maximum that weights are relative to moves only when a score exceeds it by this power of two: most blocks then
// rescale nothing, and neither float32 sums nor bfloat16 weights lose a bit by it.
constexpr float kSlack = 8.0F;

// The maximum of a row that has seen no key yet: finite, because what a window hides scores minus infinity.
constexpr float kLowest = -1e30F;

struct Scratch {
  uint32_t* q;        // [kTile, pairs]
  uint32_t* weights;  // [kRows, kKeyPairs]
  float* sums;        // [kTile, width]
  float* totals;      // [kTile, kLanes]: partial sums of the weights
  float* maxima;      // [kTile], in powers of two
  int* visible;       // [kTile]: the row sees the keys before this one,
  int* hidden;        // [kTile]: and not those before this one
  size_t* choice;     // [kTile]: where the row's choice of blocks begins in task.chosen

  Scratch(const PrefillTask& task, uint32_t* memory) {
    choice = reinterpret_cast<size_t*>(memory);
    sums = reinterpret_cast<float*>(choice + kTile);
    totals = sums + kTile * task.width();
    weights = reinterpret_cast<uint32_t*>(totals + kTile * kLanes);
    maxima = reinterpret_cast<float*>(weights + kRows * kKeyPairs);
    visible = reinterpret_cast<int*>(maxima + kTile);
    hidden = visible + kTile;
    q = reinterpret_cast<uint32_t*>(hidden + kTile);
  }
  static size_t words(const PrefillTask& task) {
    return static_cast<size_t>(kTile) * (task.width() + kLanes + 3 + task.pairs()) + kRows * kKeyPairs +
           kTile * sizeof(size_t) / sizeof(uint32_t);
  }
};

inline size_t key_words(const PrefillTask& task) { return static_cast<size_t>(task.pairs()) * kKeyBlock; }
inline size_t block_words(const PrefillTask& task) { return key_words(task) + static_cast<size_t>(kKeyPairs) * task.width(); }

inline void pack(const PrefillTask& task, int kv_head, int block, uint32_t* packed) {
  const int first = block * kKeyBlock;
  const int count = task.num_keys - first < kKeyBlock ? task.num_keys - first : kKeyBlock;
  pack_keys(task.k, kv_head, first, count, task.head_dim, packed);
  pack_values(task.v, kv_head, first, count, task.head_dim, packed + key_words(task));
}

template <int kUsed>
ALISA_INLINE F largest(const F (&x)[kUsed]) {
  F most = x[0];
  for (int i = 1; i < kUsed; ++i) most = _mm512_max_ps(most, x[i]);
  return most;
}

// The row's weights are relative to a larger maximum from here on.
inline void raise_maximum(float* sums, float* totals, float& maximum, float raised, int width) {
  const F scale = exp2_of(_mm512_set1_ps(maximum - raised));
  for (int i = 0; i < width; i += kLanes) _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), scale));
  _mm512_storeu_ps(totals, _mm512_mul_ps(_mm512_loadu_ps(totals), scale));
  maximum = raised;
}

// Weights of one strip on the first 16 * kUsed keys of a block, as bfloat16 in scratch.weights. The rows of the bits of
// `skipping` do not read the block: to them all of its keys are hidden.
template <int kUsed>
inline void weigh(const Scratch& scratch, int strip, const uint32_t* keys, int first_key, bool hides, unsigned skipping,
                  int pairs, int width, F scale, float cap) {
  F scores[kRows][kUsed];
  const int first = strip * kRows;
  products<kUsed>(scratch.q + first * pairs, keys, pairs, scores);
  for (int row = 0; row < kRows; ++row) {
    F (&x)[kUsed] = scores[row];
    if (cap > 0.0F) {
      for (int i = 0; i < kUsed; ++i) x[i] = cap_scores(x[i], cap);
    }
    if (hides || skipping != 0) {
      const unsigned read = (skipping >> row & 1U) != 0 ? 0U : ~0U;
      for (int i = 0; i < kUsed; ++i) {
        const int lane = first_key + i * kLanes;
        const auto seen = static_cast<__mmask16>(read & first_lanes(scratch.visible[first + row] - lane) &
                                                 ~first_lanes(scratch.hidden[first + row] - lane));
        x[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen, x[i]);
      }
    }
    float& maximum = scratch.maxima[first + row];
    const F limit = _mm512_set1_ps(maximum + kSlack);
    const F most = _mm512_mul_ps(largest(x), scale);
    float* totals = scratch.totals + (first + row) * kLanes;
    if (_mm512_cmp_ps_mask(most, limit, _CMP_GT_OQ) != 0) {
      raise_maximum(scratch.sums + (first + row) * width, totals, maximum, _mm512_reduce_max_ps(most), width);
    }
    const F negative = _mm512_set1_ps(-maximum);
    for (int i = 0; i < kUsed; ++i) x[i] = exp2_of(_mm512_fmadd_ps(x[i], scale, negative));
    F total = _mm512_loadu_ps(totals);
    for (int i = 0; i < kUsed; ++i) total = _mm512_add_ps(total, x[i]);
    _mm512_storeu_ps(totals, total);
    for (int i = 0; i < kUsed; i += 2) {
      _mm512_storeu_si512(scratch.weights + row * kKeyPairs + i * (kLanes / 2), (__m512i)_mm512_cvtne2ps_pbh(x[i + 1], x[i]));
    }
  }
}

// Sums of one strip have grown by weights x values, for 16 * kUsed values of a head.
template <int kUsed>
ALISA_INLINE void add_values(const uint32_t* weights, const uint32_t* values, int key_pairs, int width, float* sums) {
  F sum[kRows][kUsed];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) sum[row][i] = _mm512_loadu_ps(sums + row * width + i * kLanes);
  }
  for (int pair = 0; pair < key_pairs; ++pair) {
    __m512i operand[kUsed];
    for (int i = 0; i < kUsed; ++i) operand[i] = load_words(values + pair * width + i * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int>(weights[row * kKeyPairs + pair]));
      for (int i = 0; i < kUsed; ++i) sum[row][i] = pair_products(sum[row][i], weight, operand[i]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) _mm512_storeu_ps(sums + row * width + i * kLanes, sum[row][i]);
  }
}

inline void add_all_values(const uint32_t* weights, const uint32_t* values, int key_pairs, int width, float* sums) {
  int i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) add_values<4>(weights, values + i, key_pairs, width, sums + i);
  switch ((width - i) / kLanes) {
    case 3: add_values<3>(weights, values + i, key_pairs, width, sums + i); break;
    case 2: add_values<2>(weights, values + i, key_pairs, width, sums + i); break;
    case 1: add_values<1>(weights, values + i, key_pairs, width, sums + i); break;
    default: break;
  }
}

// Queries of a tile copied to consecutive memory, and what they start from; returns the most keys that a row sees.
inline int open_rows(const PrefillTask& task, int kv_head, int tile, const Scratch& scratch) {
  const int group = task.group();
  const int width = task.width();
  const int rows = task.num_queries * group;
  const int pairs = task.pairs();
  int most = 0;
  for (int i = 0; i < kTile; ++i) {
    const int row = tile * kTile + i;
    uint32_t* query = scratch.q + i * pairs;
    float* sums = scratch.sums + i * width;
    float* totals = scratch.totals + i * kLanes;
    query[pairs - 1] = 0;
    const size_t token_block = static_cast<size_t>(std::min(row, rows - 1) / group / kQueryBlock);
    scratch.choice[i] = (token_block * task.num_kv_heads + kv_head) * task.chosen_stride;
    for (int j = 0; j < width; j += kLanes) _mm512_storeu_ps(sums + j, _mm512_setzero_ps());
    _mm512_storeu_ps(totals, _mm512_setzero_ps());
    scratch.maxima[i] = kLowest;
    if (row >= rows) {
      // Nobody reads what becomes of these.
      for (int pair = 0; pair < pairs; ++pair) query[pair] = 0;
      scratch.visible[i] = scratch.visible[i - 1];
      scratch.hidden[i] = scratch.hidden[i - 1];
      continue;
    }
    const int token = row / group;
    const int head = kv_head * group + row % group;
    std::memcpy(query, task.q.at(token, head), static_cast<size_t>(task.head_dim) * sizeof(uint16_t));
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
    const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(scratch.totals + i * kLanes));
    // A row that a window hides all keys from so far counts as one of a weight that is nothing next to any other.
    const bool sees = total > 0.0F;
    const F inverse = _mm512_set1_ps(sees ? 1.0F / total : 0.0F);
    task.log_sum_exp[at] = sees ? scratch.maxima[i] * kLn2 + __builtin_logf(total) : kLowest;
    for (int j = 0; j < width; j += kLanes) {
      const F mean = _mm512_mul_ps(_mm512_loadu_ps(scratch.sums + i * width + j), inverse);
      const __mmask16 mask = first_lanes(task.head_dim - j);
      const size_t place = at * task.head_dim + j;
      if (task.after != nullptr) {
        _mm512_mask_storeu_ps(task.after + place, mask, mean);
      } else {
        _mm256_mask_storeu_epi16(task.out + place, mask, (__m256i)_mm512_cvtneps_pbh(mean));
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
  const int pairs = task.pairs();
  const int width = task.width();
  const float root = __builtin_sqrtf(static_cast<float>(task.head_dim));
  const F scale = _mm512_set1_ps(kLog2E / root);
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
        weigh<kVectors>(scratch, strip, keys, first, hides, skipping, pairs, width, scale, cap);
      } else {
        weigh<kVectors / 2>(scratch, strip, keys, first, hides, skipping, pairs, width, scale, cap);
      }
      const int key_pairs = most_seen > kKeyBlock / 2 ? kKeyPairs : kKeyPairs / 2;
      add_all_values(scratch.weights, keys + key_words(task), key_pairs, width, scratch.sums + strip * kRows * width);
    }
  }
  close_rows(task, kv_head, tile, scratch);
}

}  // namespace alisa::avx512_bf16
