// Decode attention over the rows of one item, in place: a partial softmax and its weighted sum of values, or its next part.
//
// For every block of kBlock rows: scores of all heads from the K halves, softmax weights relative to a running maximum,
// then the weighted sum of the V halves. Each half-row is read once, from its first byte to its last, kPanel rows side by
// side, and every K/V head serves all the query heads of its group while it is in registers. The weights of every block
// are kept: `finish` turns them into mass without computing a second exponential.
//
// The idea of merging partial softmaxes by their maximum and sum is flash decoding's (Dao-AILab/flash-attention).
#pragma once

#include "block_rows.h"
#include "dot.h"
#include "elements.h"
#include "exponential.h"
#include "pairs.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// What one thread needs while it attends.
struct AttendScratch {
  float* query;      // [H, keys().head_stride()], scaled by D^-0.5, padded with 0
  float* query_sum;  // [H, P]
  float* scaled;     // [G, P, H / G, kBlock] for coded rows: products of codes in several parts, then weight * scale
  uint32_t* pairs;   // [2, G, P, kBlock] for coded rows, see gather_pairs

  static size_t sums(const RowLayout& layout, int num_heads) {
    return static_cast<size_t>(round_up(num_heads * layout.parts, kPad));
  }
  static size_t floats(const RowLayout& layout, int num_heads) {
    const int block_parts = layout.coded() ? num_heads * layout.parts + 2 * layout.num_pairs() : 0;
    return static_cast<size_t>(num_heads) * layout.keys().head_stride() + sums(layout, num_heads) +
           kBlock * static_cast<size_t>(block_parts);
  }
  AttendScratch(const RowLayout& layout, int num_heads, float* memory)
      : query(memory),
        query_sum(query + static_cast<size_t>(num_heads) * layout.keys().head_stride()),
        scaled(query_sum + sums(layout, num_heads)),
        pairs(reinterpret_cast<uint32_t*>(scaled + static_cast<size_t>(num_heads * layout.parts) * kBlock)) {}
};

// One part of a query, scaled and padded; returns its sum.
ALISA_INLINE float prepare_part(const HalfLayout& layout, const uint8_t* source, Dtype dtype, float scale, float* query) {
  const int dim = layout.part_dim();
  widen(dtype, source, dim, query);
  if (layout.planes() > 1) {
    // Planes lie one after the other, each padded.
    const int plane = layout.plane_len();
    float* high = query + layout.plane_stride();
    __builtin_memmove(high, query + plane, static_cast<size_t>(dim - plane) * sizeof(float));
    for (int i = dim - plane; i < layout.plane_stride(); ++i) high[i] = 0.0F;
  }
  for (int i = layout.plane_len(); i < layout.plane_stride(); ++i) query[i] = 0.0F;
  F total = set1(0.0F);
  for (int i = 0; i < layout.part_stride(); i += kWidth) {
    const F scaled = load(query + i) * set1(scale);
    store(query + i, scaled);
    total = total + scaled;
  }
  return sum_of(total);
}

ALISA_INLINE void prepare_query(const DecodeTask& task, int seq, const AttendScratch& scratch) {
  const HalfLayout layout = task.layout.keys();
  const int num_parts = task.num_heads * layout.parts;
  const size_t part_bytes = static_cast<size_t>(layout.part_dim()) * value_bytes(task.q_dtype);
  const float scale = 1.0F / __builtin_sqrtf(static_cast<float>(layout.head_dim));
  const auto* source = static_cast<const uint8_t*>(task.q) + static_cast<size_t>(seq) * num_parts * part_bytes;
  for (int i = 0; i < num_parts; ++i) {
    float* query = scratch.query + static_cast<size_t>(i) * layout.part_stride();
    scratch.query_sum[i] = prepare_part(layout, source + i * part_bytes, task.q_dtype, scale, query);
  }
}

// `kParted`: heads are in several parts; where they are not, there are no loops over them in the way of the compiler.
template <class Keys, class Values, bool kParted>
class BlockAttention {
 public:
  BlockAttention(const DecodeTask& task, const AttendScratch& scratch, float* acc)
      : layout_(task.layout),
        scratch_(scratch),
        acc_(acc),
        keys_(task.layout.keys(), task.num_heads),
        values_(task.layout.values(), task.num_heads),
        ahead_(task.layout, task.num_sets == 1 ? task.layout.num_kv_heads : 1) {}

  // Products of all rows with the query into `products` [G, P, H / G, kBlock].
  void score(const BlockRows& rows, const BlockRows& next, float* products) {
    for (int at = 0; at < rows.count; at += kPanel) {
      ahead_.begin(rows, next, at);
      if constexpr (Keys::kCoded) prefetch_pairs(layout_, rows, at, kPanel);
      for (int i = 0; i < rows.num_kv_heads; ++i) {
        ahead_.advance(i);
        const int g = rows.first_kv_head + i;
        for (int p = 0; p < parts(); ++p) {
          const auto part = static_cast<size_t>(g * parts() + p);
          float* out = products + part * keys_.group * kBlock + at;
          const float* query = scratch_.query + static_cast<size_t>(g) * keys_.group * keys_.head + p * keys_.part;
          for_head_tiles<ScoreTile<Keys>::kMost>(keys_.group,
                                                 ScoreTile<Keys>{rows.row + at, part * keys_.part_bytes, query, keys_, out});
        }
      }
    }
  }

  // Adds the values of all rows to the accumulators; weights are [G, P, H / G, kBlock].
  void accumulate(const BlockRows& rows, const BlockRows& next, const float* weights) {
    const int chunks = round_up(rows.count, kPanel);
    for (int at = 0; at < rows.count; at += kPanel) {
      ahead_.begin(rows, next, chunks + at);
      for (int i = 0; i < rows.num_kv_heads; ++i) {
        ahead_.advance(i);
        const int g = rows.first_kv_head + i;
        for (int p = 0; p < parts(); ++p) {
          const auto part = static_cast<size_t>(g * parts() + p);
          const size_t offset = layout_.values_at() + part * values_.part_bytes;
          const float* of_group = weights + part * values_.group * kBlock + at;
          float* acc = acc_ + static_cast<size_t>(g) * values_.group * values_.head + p * values_.part;
          for_head_tiles<ValueTile<Values>::kMost>(values_.group,
                                                   ValueTile<Values>{rows.row + at, offset, of_group, values_, acc});
        }
      }
    }
  }

 private:
  int parts() const { return kParted ? layout_.parts : 1; }

  const RowLayout& layout_;
  const AttendScratch& scratch_;
  float* acc_;  // [H, head of V]
  Shape<Keys> keys_;
  Shape<Values> values_;
  Ahead ahead_;
};

// Scores s of one head become cap * tanh(s / cap).
inline void cap_scores(float* scores, float cap) {
  for (int i = 0; i < kBlock; i += kWidth) store(scores + i, softcapped(load(scores + i), cap));
}

// Scores of one head become weights relative to its running maximum; returns what the sums so far must be scaled by.
inline float weigh(float* weights, int count, float& maximum, float& total) {
  for (int i = count; i < kBlock; ++i) weights[i] = -__builtin_inff();
  F best = load(weights);
  for (int i = kWidth; i < kBlock; i += kWidth) best = vmax(best, load(weights + i));
  const float block_max = max_of(best);
  float rescale = 1.0F;
  if (block_max > maximum) {
    rescale = exp_nonpositive(maximum - block_max);
    maximum = block_max;
  }
  F sum = set1(0.0F);
  for (int i = 0; i < kBlock; i += kWidth) {
    const F weight = exp_nonpositive(load(weights + i) - set1(maximum));
    store(weights + i, weight);
    sum = sum + weight;
  }
  total = total * rescale + sum_of(sum);
  return rescale;
}

// The parts of one query head in what `AttendScratch` has for coded rows.
struct HeadParts {
  const AttendScratch& scratch;
  int parts;
  int group;
  int kv_head;
  int head;

  int part(int p) const { return kv_head * parts + p; }
  // Products of codes where there are several parts, then weights of codes.
  float* scaled(int p) const {
    return scratch.scaled + static_cast<size_t>((part(p) - kv_head) * group + head) * kBlock;
  }
  const uint32_t* pairs(int p) const { return scratch.pairs + static_cast<size_t>(part(p)) * kBlock; }
  float query_sum(int p) const { return scratch.query_sum[head * parts + p]; }
};

// Products of the parts of one head with codes become the scores of the head; those of an only part are in their place.
inline void score_head(const HeadParts& of, float* scores) {
  apply_keys<false>(of.pairs(0), of.query_sum(0), of.parts > 1 ? of.scaled(0) : scores, scores);
  for (int p = 1; p < of.parts; ++p) apply_keys<true>(of.pairs(p), of.query_sum(p), of.scaled(p), scores);
}

// Weights of one head become those of the codes of its parts, and what the minima add goes to `shift` [P].
inline void weigh_parts(const HeadParts& of, size_t value_pairs, const float* weights, float rescale, float* shift) {
  for (int p = 0; p < of.parts; ++p) {
    shift[p] = shift[p] * rescale + apply_values(of.pairs(p) + value_pairs, weights, of.scaled(p));
  }
}

template <class Keys, class Values, bool kParted = false>
void attend_item(const DecodeTask& task, int index, float* memory) {
  const RowLayout& layout = task.layout;
  const Item& item = task.items[index];
  const int num_heads = task.num_heads;
  const int stride = layout.values().head_stride();
  const AttendScratch scratch(layout, num_heads, memory);
  const auto partial = static_cast<size_t>(task.grid.first_partial[item.seq] + item.first_block / kItemBlocks);
  float* acc = task.partial_out + partial * num_heads * stride;
  float* maximum = task.partial_max + partial * num_heads;
  float* total = task.partial_sum + partial * num_heads;
  float* shift = task.partial_shift + partial * num_heads * layout.parts;
  prepare_query(task, item.seq, scratch);
  if (item.first_block % kItemBlocks == 0) {
    for (size_t i = 0; i < static_cast<size_t>(num_heads) * stride; ++i) acc[i] = 0.0F;
    for (int h = 0; h < num_heads; ++h) {
      maximum[h] = -__builtin_inff();
      total[h] = 0.0F;
    }
    for (int i = 0; i < num_heads * layout.parts; ++i) shift[i] = 0.0F;
  }

  BlockAttention<Keys, Values, kParted> attention(task, scratch, acc);
  const int group = num_heads / layout.num_kv_heads;
  const size_t value_pairs = static_cast<size_t>(layout.num_pairs()) * kBlock;
  const int last_block = item.first_block + item.num_blocks - 1;
  BlockRows rows = block_rows(task, item.seq, 0, item.first_block);
  for (int block = item.first_block; block <= last_block; ++block) {
    const size_t number = task.grid.first_block[item.seq] + static_cast<size_t>(block);
    float* weights = task.weights + number * num_heads * kBlock;
    for (int set = 0; set < task.num_sets; ++set) {
      const bool last_set = set + 1 == task.num_sets;
      const int next_block = last_set && block < last_block ? block + 1 : block;
      const BlockRows next = block_rows(task, item.seq, last_set ? 0 : set + 1, next_block);
      attention.score(rows, next, kParted ? scratch.scaled : weights);
      if constexpr (Keys::kCoded) gather_pairs(layout, rows, scratch.pairs);
      for (int h = rows.first_kv_head * group; h < (rows.first_kv_head + rows.num_kv_heads) * group; ++h) {
        float* of_head = weights + static_cast<size_t>(h) * kBlock;
        const HeadParts parts = {scratch, kParted ? layout.parts : 1, group, h / group, h};
        if constexpr (Keys::kCoded) score_head(parts, of_head);
        if (task.softcap > 0.0F) cap_scores(of_head, task.softcap);
        const float rescale = weigh(of_head, rows.count, maximum[h], total[h]);
        task.block_max[number * num_heads + h] = maximum[h];
        if (rescale != 1.0F) {
          float* of_acc = acc + static_cast<size_t>(h) * stride;
          for (int i = 0; i < stride; i += kWidth) store(of_acc + i, load(of_acc + i) * set1(rescale));
        }
        if constexpr (Keys::kCoded) weigh_parts(parts, value_pairs, of_head, rescale, shift + h * layout.parts);
      }
      attention.accumulate(rows, next, Keys::kCoded ? scratch.scaled : weights);
      rows = next;
    }
  }
}

inline void attend(const DecodeTask& task, int item, float* scratch) {
  const bool parted = task.layout.parts > 1;
  switch (task.layout.dtype) {
    case Dtype::kFloat32: return attend_item<Float32Row, Float32Row>(task, item, scratch);
    case Dtype::kBFloat16: return attend_item<BFloat16Row, BFloat16Row>(task, item, scratch);
    case Dtype::kFloat16: return attend_item<Float16Row, Float16Row>(task, item, scratch);
    case Dtype::kInt8: return attend_item<Int8Row, Int8Row>(task, item, scratch);
    case Dtype::kInt4:
      return parted ? attend_item<Int4Row, Int4Row, true>(task, item, scratch) : attend_item<Int4Row, Int4Row>(task, item, scratch);
    case Dtype::kK8V4:
      return parted ? attend_item<Int8Row, Int4Row, true>(task, item, scratch) : attend_item<Int8Row, Int4Row>(task, item, scratch);
  }
}

}  // namespace alisa::ALISA_ISA
