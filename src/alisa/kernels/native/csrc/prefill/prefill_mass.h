// Attention weights of a prompt's last tokens on one block of keys, whose log-sum-exp is known.
#pragma once

#include <cstring>

#include "prefill_strip.h"

namespace alisa::ALISA_ISA {

// Tokens whose weights are summed together: enough to be worth packing the keys that they share.
constexpr int kMassTokens = 32;

struct MassScratch {
  float* mass;     // [kMassTokens, kKeyBlock]
  uint32_t* keys;  // one packed block
  uint32_t* q;     // [kRows, words of a head]

  MassScratch(const MassTask& task, uint32_t* memory) {
    mass = reinterpret_cast<float*>(memory);
    keys = memory + kMassTokens * kKeyBlock;
    q = keys + head_words(task.head_dim) * kKeyBlock;
  }
  static size_t words(const MassTask& task) {
    const auto words = static_cast<size_t>(head_words(task.head_dim));
    return (kMassTokens + words) * kKeyBlock + kRows * words;
  }
};

// Weights of the rows of one KV head, added up for each token in scratch.mass.
inline void add_mass(const MassTask& task, int kv_head, int first_token, int num_tokens, int first_key,
                     const MassScratch& scratch) {
  const int group = task.group();
  const int words = head_words(task.head_dim);
  const float root = __builtin_sqrtf(static_cast<float>(task.head_dim));
  const F scale = set1(kLog2E / root);
  const float cap = task.softcap * root;
  const int rows = num_tokens * group;
  for (int strip = 0; strip < rows; strip += kRows) {
    const int count = rows - strip < kRows ? rows - strip : kRows;
    for (int i = 0; i < count; ++i) {
      const int row = strip + i;
      copy_query(task.q.at(first_token + row / group, kv_head * group + row % group), task.head_dim, scratch.q + i * words);
    }
    F scores[kRows][kVectors];
    products<kVectors>(scratch.q, scratch.keys, words, scores);
    for (int i = 0; i < count; ++i) {
      const int token = (strip + i) / group;
      const int head = kv_head * group + (strip + i) % group;
      const size_t at = static_cast<size_t>(first_token + token) * task.num_heads + head;
      const F negative = set1(-task.log_sum_exp[at] * kLog2E);
      const int seen = task.ahead + first_token + token + 1 - first_key;
      float* mass = scratch.mass + token * kKeyBlock;
      for (int j = 0; j < kVectors; ++j) {
        const F score = cap > 0.0F ? cap_scores(scores[i][j], cap) : scores[i][j];
        const F weight = exp2_of(fma(score, scale, negative));
        store(mass + j * kWidth, add_first(load(mass + j * kWidth), weight, seen - j * kWidth));
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
  std::memset(scratch.q, 0, static_cast<size_t>(kRows) * head_words(task.head_dim) * sizeof(uint32_t));
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

}  // namespace alisa::ALISA_ISA
