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
  float* steps;       // [kSketchBlock * G] padded: ranges of the block at hand
  float* minima;      // the same
  float* factors;     // [kSketchBlock, heads]: what the codes of values are multiplied by
  float* values;      // [D] padded: one head of the query, or of the values
  int32_t* products;  // [kSketchBlock, product_stride]: of the block at hand

  // From one token's products to the next one's.
  static size_t product_stride(int heads) { return static_cast<size_t>(heads) + kSlack; }
  static size_t value_floats(const SketchLayout& layout) { return static_cast<size_t>(round_up(layout.head_dim, kPad)); }
  static size_t range_floats(const SketchLayout& layout) {
    return static_cast<size_t>(round_up(kSketchBlock * layout.num_kv_heads, kPad) + 2 * kPad);
  }
  static size_t floats(const SketchLayout& layout, int num_heads) {
    const int heads = round_up(num_heads, kPad);
    return SketchQuery::floats(layout, num_heads) + 2 * range_floats(layout) + kSketchBlock * static_cast<size_t>(heads) +
           value_floats(layout) + kSketchBlock * product_stride(heads);
  }
  SketchScratch(const SketchTask& task, float* memory)
      : query(task.heads(), memory),
        steps(memory + SketchQuery::floats(task.layout, task.num_heads)),
        minima(steps + range_floats(task.layout)),
        factors(minima + range_floats(task.layout)),
        values(factors + kSketchBlock * static_cast<size_t>(task.heads())),
        products(reinterpret_cast<int32_t*>(values + value_floats(task.layout))) {}
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

inline void set_lanes(const SketchTask& task, int32_t* lanes) {
  for (int h = 0; h < task.heads(); ++h) lanes[h] = kv_head_of(task, h) - kv_head_of(task, h / kWidth * kWidth);
}

// `values` is room for one head.
inline void prepare_query(const SketchTask& task, int seq, const SketchQuery& query, float* values) {
  const SketchLayout& layout = task.layout;
  const int dim = layout.head_dim;
  const size_t bytes = value_bytes(task.q_dtype);
  const auto whole = static_cast<size_t>(dim) * task.parts;
  const auto* source = static_cast<const uint8_t*>(task.q) + static_cast<size_t>(seq) * task.num_heads * dim * bytes;
  set_lanes(task, query.lanes);
  for (int h = 0; h < task.heads(); ++h) {
    query.scale[h] = query.sum[h] = 0.0F;
    if (h >= task.num_heads) continue;
    const size_t first = task.head_of(h) * whole + task.offset_of(h);
    widen(task.q_dtype, source + first * bytes, dim, values);
    const float unit = round_query(values, dim, dim * task.parts);
    query.scale[h] = unit;
    query.sum[h] = static_cast<float>(put_query(values, layout, h, query.words)) * unit;
  }
}

// Asks for what will be read later, line by line. Inlined by force: a function that only prefetches has no effect in the eyes
// of GCC, which then drops the call.
ALISA_INLINE void prefetch_span(const void* from, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(from);
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

// Steps and minima of the keys or values of `count` tokens, whose ranges [count, G, 2] begin at `source`.
inline void widen_ranges(int num_kv_heads, const void* source, int count, const SketchScratch& scratch) {
  const auto* from = static_cast<const uint16_t*>(source);
  const int total = count * num_kv_heads;
  float* steps = scratch.steps;
  float* minima = scratch.minima;
  F step, minimum;
  int i = 0;
  for (; i + kWidth <= total; i += kWidth) {
    load_f16_pairs(from + 2 * i, step, minimum);
    store(steps + i, step);
    store(minima + i, minimum);
  }
  uint16_t padded[2 * kWidth] = {};
  std::memcpy(padded, from + 2 * i, static_cast<size_t>(total - i) * 2 * sizeof(uint16_t));
  load_f16_pairs(padded, step, minimum);
  store(steps + i, step);
  store(minima + i, minimum);
}

}  // namespace alisa::ALISA_ISA
