// Which blocks of keys the queries of a prompt read, by the means of the blocks: see ChoiceTask.
#pragma once

#include <algorithm>
#include <cstring>

#include "prefill_strip.h"

namespace alisa::ALISA_ISA {

// Blocks before a query's own that it reads in any case.
constexpr int kLocalBlocks = 2;

inline void means(const MeansTask& task, int block) {
  const F part = set1(1.0F / kKeyBlock);
  for (int kv_head = 0; kv_head < task.num_kv_heads; ++kv_head) {
    uint16_t* mean = task.means + (static_cast<size_t>(block) * task.num_kv_heads + kv_head) * task.head_dim;
    for (int i = 0; i < task.head_dim; i += kWidth) {
      const int left = task.head_dim - i;
      F sum = set1(0.0F);
      for (int key = 0; key < kKeyBlock; ++key) {
        sum = sum + load_first(task.k.at(block * kKeyBlock + key, kv_head) + i, left);
      }
      store_first(mean + i, sum * part, left);
    }
  }
}

struct ChoiceScratch {
  int stride;       // room for means: whole blocks
  uint32_t* means;  // packed as keys are, `kKeyBlock` at a time
  float* scores;    // [kRows, stride]
  float* totals;    // [stride]
  uint32_t* q;      // [kRows, words of a head]

  ChoiceScratch(const ChoiceTask& task, uint32_t* memory) : stride(round_up(task.num_means(), kKeyBlock)) {
    means = memory;
    scores = reinterpret_cast<float*>(means + static_cast<size_t>(stride) * head_words(task.head_dim));
    totals = scores + kRows * stride;
    q = reinterpret_cast<uint32_t*>(totals + stride);
  }
  static size_t words(const ChoiceTask& task) {
    const auto room = static_cast<size_t>(round_up(task.num_means(), kKeyBlock));
    const auto words = static_cast<size_t>(head_words(task.head_dim));
    return room * (words + kRows + 1) + kRows * words;
  }
};

// Scores of up to six tokens of a head with the first `count` means, those after it minus infinity.
inline void score_means(const ChoiceTask& task, int head, int token, int num_tokens, int count, const ChoiceScratch& scratch) {
  const int words = head_words(task.head_dim);
  const float cap = task.softcap * __builtin_sqrtf(static_cast<float>(task.head_dim));
  for (int row = 0; row < num_tokens; ++row) {
    copy_query(task.q.at(token + row, head), task.head_dim, scratch.q + row * words);
  }
  for (int first = 0; first < count; first += kKeyBlock) {
    F scores[kRows][kVectors];
    products<kVectors>(scratch.q, scratch.means + static_cast<size_t>(first) * words, words, scores);
    for (int row = 0; row < num_tokens; ++row) {
      for (int i = 0; i < kVectors; ++i) {
        const F score = cap > 0.0F ? cap_scores(scores[row][i], cap) : scores[row][i];
        store(scratch.scores + row * scratch.stride + first + i * kWidth, seen_only(score, 0, count - first - i * kWidth));
      }
    }
  }
}

// Weights of a row on the means, relative to its largest, are added to the totals.
inline void add_weights(const float* scores, int count, F scale, float* totals) {
  F most = set1(-__builtin_inff());
  for (int i = 0; i < count; i += kWidth) most = vmax(most, load(scores + i));
  const F largest = set1(max_of(most));
  for (int i = 0; i < count; i += kWidth) {
    const F weight = exp2_of((load(scores + i) - largest) * scale);
    store(totals + i, load(totals + i) + weight);
  }
}

inline void choose(const ChoiceTask& task, int block, int kv_head, uint32_t* memory) {
  const ChoiceScratch scratch(task, memory);
  const int own = task.first_block + block;
  uint8_t* chosen = task.chosen + (static_cast<size_t>(block) * task.num_kv_heads + kv_head) * task.chosen_stride;
  for (int i = 0; i <= own; ++i) chosen[i] = i == 0 || i >= own - kLocalBlocks ? 1 : 0;
  for (int first = 0; first < own; first += kKeyBlock) {
    pack_keys(task.means, kv_head, first, std::min(own - first, kKeyBlock), task.head_dim,
              scratch.means + static_cast<size_t>(first) * head_words(task.head_dim));
  }
  // Rows of the last strip that no token fills: defined, though nobody looks at what becomes of them.
  std::memset(scratch.q, 0, static_cast<size_t>(kRows) * head_words(task.head_dim) * sizeof(uint32_t));
  const F scale = set1(kLog2E / __builtin_sqrtf(static_cast<float>(task.head_dim)));
  for (int i = 0; i < task.group(); ++i) {
    std::memset(scratch.totals, 0, static_cast<size_t>(scratch.stride) * sizeof(float));
    for (int token = 0; token < kQueryBlock; token += kRows) {
      const int count = std::min(kRows, kQueryBlock - token);
      score_means(task, kv_head * task.group() + i, block * kQueryBlock + token, count, own, scratch);
      for (int row = 0; row < count; ++row) add_weights(scratch.scores + row * scratch.stride, own, scale, scratch.totals);
    }
    float most = 0.0F;
    for (int j = 0; j < own; ++j) most = std::max(most, scratch.totals[j]);
    for (int j = 0; j < own; ++j) {
      if (scratch.totals[j] >= task.alpha * most) chosen[j] = 1;
    }
  }
}

}  // namespace alisa::ALISA_ISA
