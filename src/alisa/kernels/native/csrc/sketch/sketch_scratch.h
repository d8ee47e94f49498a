// What a thread has at hand while it scores tokens of a sketch: the rounded query, and the ranges of a block of tokens.
#pragma once

#include "elements.h"
#include "sketch_dot.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// How far ahead of the reader codes are asked for: 4 KiB as well where a token has 4 KiB, twice as slow where it has one.
constexpr size_t kSketchAheadBytes = 8192;

// A sequence's query as the products need it. Heads are padded with queries of 0.
struct SketchQuery {
  float* scale;    // [heads]: what one unit of the rounded query is worth, D^-0.5 included
  float* sum;      // [heads]: sum of the rounded query, in the same measure
  int32_t* lanes;  // [heads]: the K/V head of each, from that of the first head in the same vector on
  Word* words;     // head_words() for each head, in an order that the products know

  static size_t floats(const SketchLayout& layout, int num_heads) {
    const auto heads = static_cast<size_t>(round_up(num_heads, kPad));
    return 3 * heads + heads * head_words(layout) * sizeof(Word) / sizeof(float);
  }
  SketchQuery(int heads, float* memory)
      : scale(memory),
        sum(scale + heads),
        lanes(reinterpret_cast<int32_t*>(sum + heads)),
        words(reinterpret_cast<Word*>(sum + 2 * static_cast<size_t>(heads))) {}
};

// What one thread needs while it scores an item or finishes a sequence.
struct SketchScratch {
  SketchQuery query;
  float* steps;       // [kSketchBlock, heads]: ranges of the block at hand, one for each query head
  float* minima;      // [kSketchBlock, heads]
  float* pairs;       // [2, kSketchBlock * G, padded]: the same for each K/V head
  float* rescale;     // [heads]: what the sums of earlier blocks are worth at the maximum of this one
  float* values;      // [D] padded: one head of the query
  int32_t* products;  // [kSketchBlock, product_stride]: of the block at hand

  // From one token's products to the next one's.
  static size_t product_stride(int heads) { return static_cast<size_t>(heads) + kSlack; }
  static size_t pair_floats(const SketchLayout& layout) {
    return static_cast<size_t>(round_up(kSketchBlock * layout.num_kv_heads, kPad) + 2 * kPad);
  }
  static size_t floats(const SketchLayout& layout, int num_heads) {
    const int heads = round_up(num_heads, kPad);
    return SketchQuery::floats(layout, num_heads) + (1 + 2 * kSketchBlock) * static_cast<size_t>(heads) +
           2 * pair_floats(layout) + static_cast<size_t>(round_up(layout.head_dim, kPad)) +
           kSketchBlock * product_stride(heads);
  }
  SketchScratch(const SketchTask& task, float* memory)
      : query(task.heads(), memory),
        steps(memory + SketchQuery::floats(task.layout, task.num_heads)),
        minima(steps + kSketchBlock * static_cast<size_t>(task.heads())),
        pairs(minima + kSketchBlock * static_cast<size_t>(task.heads())),
        rescale(pairs + 2 * pair_floats(task.layout)),
        values(rescale + task.heads()),
        products(reinterpret_cast<int32_t*>(values + round_up(task.layout.head_dim, kPad))) {}
};

// A part of a head of `head_dim` values becomes whole numbers up to kQueryReach; returns what one of them is worth.
inline float round_query(float* values, int dim, int head_dim) {
  for (int i = dim; i < round_up(dim, kWidth); ++i) values[i] = 0.0F;
  F largest = set1(0.0F);
  for (int i = 0; i < dim; i += kWidth) {
    const F x = load(values + i);
    largest = vmax(largest, vmax(x, set1(0.0F) - x));
  }
  const float reach = max_of(largest);
  // Smaller queries give every token the same weight, to the last bit.
  const float inverse = reach > 1e-30F ? kQueryReach / reach : 0.0F;
  for (int i = 0; i < dim; i += kWidth) store(values + i, round_even(load(values + i) * set1(inverse)));
  return reach / kQueryReach / __builtin_sqrtf(static_cast<float>(head_dim));
}

// The K/V head of a query head; of padding, the last one.
inline int kv_head_of(const SketchTask& task, int head) {
  const int kv_head = head / (task.num_heads / task.layout.num_kv_heads);
  return kv_head < task.layout.num_kv_heads ? kv_head : task.layout.num_kv_heads - 1;
}

// `values` is room for one head.
inline void prepare_query(const SketchTask& task, int seq, const SketchQuery& query, float* values) {
  const SketchLayout& layout = task.layout;
  const int dim = layout.head_dim;
  const size_t bytes = value_bytes(task.q_dtype);
  const auto whole = static_cast<size_t>(dim) * task.parts;
  const auto* source = static_cast<const uint8_t*>(task.q) + static_cast<size_t>(seq) * task.num_heads * dim * bytes;
  for (int h = 0; h < task.heads(); ++h) {
    query.lanes[h] = kv_head_of(task, h) - kv_head_of(task, h / kWidth * kWidth);
    query.scale[h] = query.sum[h] = 0.0F;
    if (h >= task.num_heads) continue;
    const size_t first = task.head_of(h) * whole + task.offset_of(h);
    widen(task.q_dtype, source + first * bytes, dim, values);
    const float unit = round_query(values, dim, dim * task.parts);
    query.scale[h] = unit;
    query.sum[h] = static_cast<float>(put_query(values, layout, h, query.words)) * unit;
  }
}

// Steps and minima of `count` tokens, whose ranges [count, G, 2] begin at `source`, for every query head.
inline void widen_ranges(const SketchTask& task, const uint16_t* source, int count, const SketchScratch& scratch) {
  const int num_kv_heads = task.layout.num_kv_heads;
  const int total = count * num_kv_heads;
  // Where every query head has a key of its own, and no head is padded, they are in place already.
  const bool in_place = num_kv_heads == task.heads();
  float* steps = in_place ? scratch.steps : scratch.pairs;
  float* minima = in_place ? scratch.minima : scratch.pairs + SketchScratch::pair_floats(task.layout);
  F step, minimum;
  int i = 0;
  for (; i + kWidth <= total; i += kWidth) {
    load_f16_pairs(source + 2 * i, step, minimum);
    store(steps + i, step);
    store(minima + i, minimum);
  }
  if (in_place) return;
  uint16_t padded[2 * kWidth] = {};
  std::memcpy(padded, source + 2 * i, static_cast<size_t>(total - i) * 2 * sizeof(uint16_t));
  load_f16_pairs(padded, step, minimum);
  store(steps + i, step);
  store(minima + i, minimum);
  float* to_steps = scratch.steps;  // copies that no store can have changed, for the compiler
  float* to_minima = scratch.minima;
  const int heads = task.heads();
  for (int h = 0; h < heads; h += kWidth) {
    const int first = kv_head_of(task, h);
    const Lanes lanes = lanes_at(scratch.query.lanes + h);
    for (int t = 0; t < count; ++t) {
      const size_t at = static_cast<size_t>(t) * heads + h;
      const int from = t * num_kv_heads + first;
      store(to_steps + at, permute(load(steps + from), lanes));
      store(to_minima + at, permute(load(minima + from), lanes));
    }
  }
}

}  // namespace alisa::ALISA_ISA
