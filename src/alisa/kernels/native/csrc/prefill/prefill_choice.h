// Which blocks of keys the queries of a prompt read, by the means of the blocks: see ChoiceTask.
#pragma once

#include <algorithm>
#include <cstring>

#include "prefill_pack.h"

namespace alisa::avx512_bf16 {

// Blocks before a query's own that it reads in any case.
constexpr int kLocalBlocks = 2;

inline void means(const MeansTask& task, int block) {
  const F part = _mm512_set1_ps(1.0F / kKeyBlock);
  for (int kv_head = 0; kv_head < task.num_kv_heads; ++kv_head) {
    uint16_t* mean = task.means + (static_cast<size_t>(block) * task.num_kv_heads + kv_head) * task.head_dim;
    for (int i = 0; i < task.head_dim; i += kLanes) {
      const __mmask16 mask = first_lanes(task.head_dim - i);
      F sum = _mm512_setzero_ps();
      for (int key = 0; key < kKeyBlock; ++key) {
        const __m256i values = _mm256_maskz_loadu_epi16(mask, task.k.at(block * kKeyBlock + key, kv_head) + i);
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)));
      }
      _mm256_mask_storeu_epi16(mean + i, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, part)));
    }
  }
}

struct ChoiceScratch {
  int stride;       // room for means: whole blocks
  uint32_t* means;  // packed as keys are, `kKeyBlock` at a time
  float* scores;    // [kRows, stride]
  float* totals;    // [stride]
  uint32_t* q;      // [kRows, pairs]

  ChoiceScratch(const ChoiceTask& task, uint32_t* memory) : stride(round_up(task.num_means(), kKeyBlock)) {
    means = memory;
    scores = reinterpret_cast<float*>(means + static_cast<size_t>(stride) * task.pairs());
    totals = scores + kRows * stride;
    q = reinterpret_cast<uint32_t*>(totals + stride);
  }
  static size_t words(const ChoiceTask& task) {
    const auto room = static_cast<size_t>(round_up(task.num_means(), kKeyBlock));
    return room * (task.pairs() + kRows + 1) + static_cast<size_t>(kRows) * task.pairs();
  }
};

// Scores of up to six tokens of a head with the first `count` means, those after it minus infinity.
inline void score_means(const ChoiceTask& task, int head, int token, int num_tokens, int count, const ChoiceScratch& scratch) {
  const int pairs = task.pairs();
  const float cap = task.softcap * __builtin_sqrtf(static_cast<float>(task.head_dim));
  for (int row = 0; row < num_tokens; ++row) {
    uint32_t* query = scratch.q + row * pairs;
    query[pairs - 1] = 0;
    std::memcpy(query, task.q.at(token + row, head), static_cast<size_t>(task.head_dim) * sizeof(uint16_t));
  }
  for (int first = 0; first < count; first += kKeyBlock) {
    F scores[kRows][kVectors];
    products<kVectors>(scratch.q, scratch.means + static_cast<size_t>(first) * pairs, pairs, scores);
    for (int row = 0; row < num_tokens; ++row) {
      for (int i = 0; i < kVectors; ++i) {
        const F score = cap > 0.0F ? cap_scores(scores[row][i], cap) : scores[row][i];
        const __mmask16 seen = first_lanes(count - first - i * kLanes);
        _mm512_storeu_ps(scratch.scores + row * scratch.stride + first + i * kLanes,
                         _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen, score));
      }
    }
  }
}

// Weights of a row on the means, relative to its largest, are added to the totals.
inline void add_weights(const float* scores, int count, F scale, float* totals) {
  F most = _mm512_set1_ps(-__builtin_inff());
  for (int i = 0; i < count; i += kLanes) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
  const F largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int i = 0; i < count; i += kLanes) {
    const F weight = exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i), largest), scale));
    _mm512_storeu_ps(totals + i, _mm512_add_ps(_mm512_loadu_ps(totals + i), weight));
  }
}

inline void choose(const ChoiceTask& task, int block, int kv_head, uint32_t* memory) {
  const ChoiceScratch scratch(task, memory);
  const int own = task.first_block + block;
  uint8_t* chosen = task.chosen + (static_cast<size_t>(block) * task.num_kv_heads + kv_head) * task.chosen_stride;
  for (int i = 0; i <= own; ++i) chosen[i] = i == 0 || i >= own - kLocalBlocks ? 1 : 0;
  for (int first = 0; first < own; first += kKeyBlock) {
    pack_keys(task.means, kv_head, first, std::min(own - first, kKeyBlock), task.head_dim,
              scratch.means + static_cast<size_t>(first) * task.pairs());
  }
  // Rows of the last strip that no token fills: defined, though nobody looks at what becomes of them.
  std::memset(scratch.q, 0, static_cast<size_t>(kRows) * task.pairs() * sizeof(uint32_t));
  const F scale = _mm512_set1_ps(kLog2E / __builtin_sqrtf(static_cast<float>(task.head_dim)));
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

}  // namespace alisa::avx512_bf16
