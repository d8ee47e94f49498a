// Attention of a prompt's tokens, dense or to chosen blocks of keys, in bfloat16: what a call is asked to do
// and who can do it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "task.h"

namespace alisa {

// Keys that are scored at once.
constexpr int kKeyBlock = 64;

// Queries that share a choice of blocks of keys.
constexpr int kQueryBlock = 64;

constexpr int kNothingHidden = -(1 << 30);

// A run of heads of tokens, bfloat16 bits; strides in values. The values of a head are consecutive.
struct Heads {
  const uint16_t* values;
  size_t token_stride;
  size_t head_stride;

  ALISA_INLINE const uint16_t* at(int token, int head) const {
    return values + static_cast<size_t>(token) * token_stride + static_cast<size_t>(head) * head_stride;
  }
};

// Attention of T tokens to one block of S keys, merged with what they have seen before.
struct PrefillTask {
  Heads q;  // [T, H, D]
  Heads k;  // [S, G, D]
  Heads v;
  int num_queries;   // T
  int num_keys;      // S
  int num_heads;     // H
  int num_kv_heads;  // G
  int head_dim;      // D
  int ahead;         // token t sees the keys before `ahead + t + 1`
  int hidden;        // and not those before `hidden + t`; kNothingHidden: there is no window
  float softcap;     // scores s become softcap * tanh(s / softcap); 0: they stay as they are
  const float* before;  // [T, H, D]: attention to the blocks before this one, log_sum_exp being theirs; null: there are none
  float* after;         // [T, H, D]: for the next block; null: `out` is written
  uint16_t* out;        // [T, H, D] bfloat16
  float* log_sum_exp;   // [T, H]
  const uint8_t* chosen;  // whether `kQueryBlock` queries read a block of keys: [T / kQueryBlock, G, chosen_stride]; null: all do
  int chosen_stride;

  ALISA_INLINE int group() const { return num_heads / num_kv_heads; }
  ALISA_INLINE int width() const { return round_up(head_dim, kPad); }
  ALISA_INLINE int num_blocks() const { return (num_keys + kKeyBlock - 1) / kKeyBlock; }
};

// Attention weights of W consecutive tokens on one block of S keys, summed over the heads of each index set.
struct MassTask {
  Heads q;  // [W, H, D]
  Heads k;  // [S, G, D]
  int num_queries;           // W
  int num_keys;              // S
  int num_heads;             // H
  int num_kv_heads;          // G
  int head_dim;              // D
  int num_sets;              // J: 1 or G
  int ahead;                 // token w sees the keys before `ahead + w + 1`
  float softcap;             // as in PrefillTask
  const float* log_sum_exp;  // [W, H], over everything that they attend to
  float* mass;               // [W, J, S]

  ALISA_INLINE int group() const { return num_heads / num_kv_heads; }
  ALISA_INLINE int num_blocks() const { return (num_keys + kKeyBlock - 1) / kKeyBlock; }
};

// Means of the keys of each of B whole blocks.
struct MeansTask {
  Heads k;  // [B * kKeyBlock, G, D]
  int num_blocks;    // B
  int num_kv_heads;  // G
  int head_dim;      // D
  uint16_t* means;   // [B, G, D] bfloat16
};

// Which blocks of keys each block of queries reads (FlashPrefill, arXiv 2603.06199). For each head, the weights of the means
// of all blocks before its own, relative to a row's largest, are added up over its rows; blocks with `alpha` of the largest
// sum are read. What one head of a KV head reads, all do; the first block, two before its own and its own, too.
struct ChoiceTask {
  Heads q;      // [T, H, D]
  Heads means;  // [M, G, D], of the blocks from the first of the sequence on
  int num_queries;   // T, whole blocks
  int first_block;   // of the queries; M is at least `first_block + T / kQueryBlock - 1`
  int num_heads;     // H
  int num_kv_heads;  // G
  int head_dim;      // D
  float softcap;     // as in PrefillTask
  float alpha;
  uint8_t* chosen;  // [T / kQueryBlock, G, chosen_stride]; what comes after a block's own is not written
  int chosen_stride;

  ALISA_INLINE int group() const { return num_heads / num_kv_heads; }
  // The most means that a block of queries is compared with.
  ALISA_INLINE int num_means() const { return first_block + num_queries / kQueryBlock - 1; }
};

struct PrefillIsa {
  const char* name;
  // Queries in one piece of work: consecutive (token, head) rows that share a KV head.
  int tile;
  // 32-bit words of one packed block of keys and values, and of what a thread needs.
  size_t (*block_words)(const PrefillTask& task);
  size_t (*scratch_words)(const PrefillTask& task);
  // Words in the order in which `attend` reads them: keys and values of one KV head, one block.
  void (*pack)(const PrefillTask& task, int kv_head, int block, uint32_t* packed);
  // One tile of queries against the packed blocks of its KV head.
  void (*attend)(const PrefillTask& task, int kv_head, int tile, const uint32_t* packed, uint32_t* scratch);

  // The same for the weights of one block, whose tiles are whole tokens.
  int mass_tile;
  size_t (*mass_scratch_words)(const MassTask& task);
  void (*mass)(const MassTask& task, int tile, int block, uint32_t* scratch);

  void (*means)(const MeansTask& task, int block);
  size_t (*choice_scratch_words)(const ChoiceTask& task);
  // One block of queries, the heads of one KV head.
  void (*choose)(const ChoiceTask& task, int block, int kv_head, uint32_t* scratch);
};

// Null where this build or this CPU lacks it.
const PrefillIsa* find_prefill(const char* name);

#ifdef ALISA_X86
extern const PrefillIsa kPrefillAvx2;
extern const PrefillIsa kPrefillAvx512Bf16;
#endif

}  // namespace alisa
