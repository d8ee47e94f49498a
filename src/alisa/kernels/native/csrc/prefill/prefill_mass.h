// Attention weights of a prompt's last tokens on one block of keys, whose log-sum-exp is known.
#pragma once

#include <cstring>

#include "prefill_pack.h"

namespace alisa::avx512_bf16 {

// Tokens whose weights are summed together: enough to be worth packing the keys that they share.
constexpr int kMassTokens = 32;

struct MassScratch {
  float* mass;     // [kMassTokens, kKeyBlock]
  uint32_t* keys;  // one packed block
  uint32_t* q;     // [kRows, pairs]

  MassScratch(const MassTask& task, uint32_t* memory) {
    mass = reinterpret_cast<float*>(memory);
    keys = memory + kMassTokens * kKeyBlock;
    q = keys + task.pairs() * kKeyBlock;
  }
  static size_t words(const MassTask& task) {
    return static_cast<size_t>(kMassTokens + task.pairs()) * kKeyBlock + static_cast<size_t>(kRows) * task.pairs();
  }
};

// Weights of the rows of one KV head, added up for each token in scratch.mass.
inline void add_mass(const MassTask& task, int kv_head, int first_token, int num_tokens, int first_key,
                     const MassScratch& scratch) {
  const int group = task.group();
  const int pairs = task.pairs();
  const float root = __builtin_sqrtf(static_cast<float>(task.head_dim));
  const F scale = _mm512_set1_ps(kLog2E / root);
  const float cap = task.softcap * root;
  const int rows = num_tokens * group;
  for (int strip = 0; strip < rows; strip += kRows) {
    const int count = rows - strip < kRows ? rows - strip : kRows;
    for (int i = 0; i < count; ++i) {
      uint32_t* query = scratch.q + i * pairs;
      const int row = strip + i;
      query[pairs - 1] = 0;
      std::memcpy(query, task.q.at(first_token + row / group, kv_head * group + row % group),
                  static_cast<size_t>(task.head_dim) * sizeof(uint16_t));
    }
    F scores[kRows][kVectors];
    products<kVectors>(scratch.q, scratch.keys, pairs, scores);
    for (int i = 0; i < count; ++i) {
      const int token = (strip + i) / group;
      const int head = kv_head * group + (strip + i) % group;
      const size_t at = static_cast<size_t>(first_token + token) * task.num_heads + head;
      const F negative = _mm512_set1_ps(-task.log_sum_exp[at] * kLog2E);
      const int seen = task.ahead + first_token + token + 1 - first_key;
      float* mass = scratch.mass + token * kKeyBlock;
      for (int j = 0; j < kVectors; ++j) {
        const F score = cap > 0.0F ? cap_scores(scores[i][j], cap) : scores[i][j];
        const F weight = exp2_of(_mm512_fmadd_ps(score, scale, negative));
        const F sum = _mm512_loadu_ps(mass + j * kLanes);
        _mm512_storeu_ps(mass + j * kLanes, _mm512_mask_add_ps(sum, first_lanes(seen - j * kLanes), sum, weight));
      }
    }
  }
}

inline void mass(const MassTask& task, int tile, int block, uint32_t* memory) {
  const MassScratch scratch(task, memory);
  const int first_token = tile * kMassTokens;
  const int num_tokens = task.num_queries - first_token < kMassTokens ? task.num_queries - first_token : kMassTokens;
  const int first_key = block * kKeyBlock;
  const int num_keys = task.num_keys - first_key < kKeyBlock ? task.num_keys - first_key : kKeyBlock;
  // Rows of the last strip that no token fills: defined, though nobody looks at what becomes of them.
  std::memset(scratch.q, 0, static_cast<size_t>(kRows) * task.pairs() * sizeof(uint32_t));
  for (int kv_head = 0; kv_head < task.num_kv_heads; ++kv_head) {
    const bool opens = kv_head == 0 || task.num_sets > 1;
    const bool closes = kv_head == task.num_kv_heads - 1 || task.num_sets > 1;
    if (opens) std::memset(scratch.mass, 0, sizeof(float) * kMassTokens * kKeyBlock);
    pack_keys(task.k, kv_head, first_key, num_keys, task.head_dim, scratch.keys);
    add_mass(task, kv_head, first_token, num_tokens, first_key, scratch);
    if (!closes) continue;
    const int set = task.num_sets > 1 ? kv_head : 0;
    for (int token = 0; token < num_tokens; ++token) {
      const size_t row = static_cast<size_t>(first_token + token) * task.num_sets + set;
      std::memcpy(task.mass + row * task.num_keys + first_key, scratch.mass + token * kKeyBlock, sizeof(float) * num_keys);
    }
  }
}

}  // namespace alisa::avx512_bf16
