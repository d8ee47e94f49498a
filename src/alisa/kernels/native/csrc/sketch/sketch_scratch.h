// What a thread has at hand while it works on tokens of a sketch: the rounded query, the ranges of the tokens and, of values,
// what their codes are multiplied by.
#pragma once

#include "elements.h"
#include "sketch_dot.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// How far ahead of the reader codes are asked for: 4 KiB as well where a token has 4 KiB, twice as slow where it has one.
constexpr size_t kSketchAheadBytes = 8192;

// A sequence's query as the products need it. Heads are padded with queries of 0.
struct SketchQuery {
  float* scale;  // [heads]: what one unit of the rounded query is worth, D^-0.5 included
  float* sum;    // [heads]: sum of the rounded query, in the same measure
  Word* words;   // head_words() for each head, in an order that the products know

  static size_t floats(const SketchLayout& layout, int num_heads) {
    const auto heads = static_cast<size_t>(round_up(num_heads, kPad));
    return 2 * heads + heads * head_words(layout) * sizeof(Word) / sizeof(float);
  }
  SketchQuery(int heads, float* memory)
      : scale(memory), sum(scale + heads), words(reinterpret_cast<Word*>(sum + heads)) {}
};

// What one thread needs while it scores or completes an item.
struct SketchScratch {
  SketchQuery query;
  float* values;    // [D] padded: one head of the query
  uint8_t* codes;   // [kWidth, P] of one head of keys: those of the last tokens, where they do not fill a vector
  uint32_t* pairs;  // ranges: [G, kSketchBlock] of a block of keys, or [kSketchItemTokens] of one head of values
  // Of values, [kSketchItemTokens] each.
  float* unread;    // 1 for tokens that are not read, 0 for others
  int32_t* tokens;  // the numbers of those that are not read
  float* steps;     // of one K/V head
  float* minima;    // the same, and 0 for tokens that are read
  float* factors;   // [group]: weights of the query heads that share the K/V head times the steps

  static size_t value_floats(const SketchLayout& layout) { return static_cast<size_t>(round_up(layout.head_dim, kPad)); }
  static size_t code_floats(const SketchLayout& layout) {
    return static_cast<size_t>(round_up(layout.code_bytes(), kPad)) * kPad / sizeof(float);
  }
  static size_t pair_floats(const SketchLayout& layout) {
    const int of_block = layout.num_kv_heads * kSketchBlock;
    return static_cast<size_t>(of_block < kSketchItemTokens ? kSketchItemTokens : of_block);
  }
  static size_t floats(const SketchLayout& layout, int num_heads) {
    return SketchQuery::floats(layout, num_heads) + value_floats(layout) + code_floats(layout) + pair_floats(layout) +
           (4 + static_cast<size_t>(num_heads / layout.num_kv_heads)) * kSketchItemTokens;
  }
  SketchScratch(const SketchTask& task, float* memory)
      : query(task.heads(), memory),
        values(memory + SketchQuery::floats(task.layout, task.num_heads)),
        codes(reinterpret_cast<uint8_t*>(values + value_floats(task.layout))),
        pairs(reinterpret_cast<uint32_t*>(values + value_floats(task.layout) + code_floats(task.layout))),
        unread(reinterpret_cast<float*>(pairs + pair_floats(task.layout))),
        tokens(reinterpret_cast<int32_t*>(unread + kSketchItemTokens)),
        steps(unread + 2 * kSketchItemTokens),
        minima(steps + kSketchItemTokens),
        factors(minima + kSketchItemTokens) {}
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

// `values` is room for one head.
inline void prepare_query(const SketchTask& task, int seq, const SketchQuery& query, float* values) {
  const SketchLayout& layout = task.layout;
  const int dim = layout.head_dim;
  const size_t bytes = value_bytes(task.q_dtype);
  const auto whole = static_cast<size_t>(dim) * task.parts;
  const auto* source = static_cast<const uint8_t*>(task.q) + static_cast<size_t>(seq) * task.num_heads * dim * bytes;
  for (int h = 0; h < task.num_heads; ++h) {
    const size_t first = task.head_of(h) * whole + task.offset_of(h);
    widen(task.q_dtype, source + first * bytes, dim, values);
    const float unit = round_query(values, dim, dim * task.parts);
    query.scale[h] = unit;
    query.sum[h] = static_cast<float>(put_query(values, layout, h, query.words)) * unit;
  }
}

// The partial result that a block of a sequence belongs to.
inline size_t partial_of(const SketchTask& task, int seq, int block) {
  return static_cast<size_t>(task.grid.first_partial[seq] + block / kSketchItemBlocks);
}

// Marks kSketchItemTokens tokens from `first` on: those among `count` ascending positions as `there`, the others as `absent`.
inline void mark_tokens(const int32_t* positions, int count, int first, float absent, float there, float* marks) {
  for (int i = 0; i < kSketchItemTokens; i += kWidth) store(marks + i, set1(absent));
  int begin = 0;
  for (int end = count; begin < end;) {
    const int middle = (begin + end) / 2;
    if (positions[middle] < first) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  for (; begin < count && positions[begin] < first + kSketchItemTokens; ++begin) marks[positions[begin] - first] = there;
}

// Asks for what will be read later, line by line. Inlined by force: a function that only prefetches has no effect in the eyes
// of GCC, which then drops the call.
ALISA_INLINE void prefetch_span(const void* from, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(from);
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

// Ranges [count, G, 2] of one head in a row: a (step, minimum) pair for each token, and zeros up to `room`. Token by token: a
// vector of pairs lies in as many vectors as there are heads.
inline void turn_ranges(const uint16_t* ranges, int num_kv_heads, int count, int room, uint32_t* pairs) {
  for (int t = 0; t < count; ++t) std::memcpy(pairs + t, ranges + static_cast<size_t>(t) * num_kv_heads * 2, sizeof(*pairs));
  for (int t = count; t < room; ++t) pairs[t] = 0;
}

// The sum of kPad lanes in vectors, in one order whatever their length.
inline float sum_lanes(F (&lanes)[kPad / kWidth]) {
  for (int half = kPad / kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
  }
  return sum_of(lanes[0]);
}

}  // namespace alisa::ALISA_ISA
