// Approximate attention weights of every token from a low-bit copy of its keys: what ranks tokens for the current query.
//
// The query is rounded to 15 bits and a sign for each head (an error far below that of the sketch), so that its products
// with the codes are sums of small integers. One vector holds the scores of one token for as many heads as it has lanes:
// nothing has to be turned round between the dot products, the ranges and the softmax, whose maximum and sum run over
// tokens, lane by lane. As in attend.h, weights relative to a running maximum are kept for every block, and whoever
// completes a sequence scales them and adds up its heads. They stay where they are, for the shares of what is then chosen.
#pragma once

#include "elements.h"
#include "exponential.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// How far ahead of the reader codes are asked for: 4 KiB as well where a token has 4 KiB, twice as slow where it has one.
constexpr size_t kSketchAheadBytes = 8192;

// What one thread needs while it scores an item or finishes a sequence. Heads are padded with queries of 0.
struct SketchScratch {
  float* query_scale;  // [heads]: what one unit of the rounded query is worth, D^-0.5 included
  float* query_sum;    // [heads]: sum of the rounded query, in the same measure
  float* steps;        // [kSketchBlock, heads]: ranges of the block at hand, one for each query head
  float* minima;       // [kSketchBlock, heads]
  float* pairs;        // [2, kSketchBlock * G, padded]: the same for each K/V head
  float* values;       // [D] padded: one head of the query
  int32_t* offsets;    // [heads]: where the codes of a head begin in those of a token
  Word* query;         // [heads, chunks, planes, kWords]

  static int chunks(const SketchLayout& layout) { return (layout.code_bytes() + kWords - 1) / kWords; }
  static size_t head_words(const SketchLayout& layout) {
    return static_cast<size_t>(chunks(layout)) * layout.planes() * kWords;
  }
  static size_t pair_floats(const SketchLayout& layout) {
    return static_cast<size_t>(round_up(kSketchBlock * layout.num_kv_heads, kPad) + 2 * kPad);
  }
  static size_t floats(const SketchLayout& layout, int num_heads) {
    const auto heads = static_cast<size_t>(round_up(num_heads, kPad));
    return (3 + 2 * kSketchBlock) * heads + 2 * pair_floats(layout) + static_cast<size_t>(round_up(layout.head_dim, kPad)) +
           heads * head_words(layout) * sizeof(Word) / sizeof(float);
  }
  SketchScratch(const SketchTask& task, float* memory) {
    const auto heads = static_cast<size_t>(task.heads());
    const auto take = [&memory](size_t count) {
      float* taken = memory;
      memory += count;
      return taken;
    };
    query_scale = take(heads);
    query_sum = take(heads);
    steps = take(kSketchBlock * heads);
    minima = take(kSketchBlock * heads);
    pairs = take(2 * pair_floats(task.layout));
    values = take(static_cast<size_t>(round_up(task.layout.head_dim, kPad)));
    offsets = reinterpret_cast<int32_t*>(take(heads));
    query = reinterpret_cast<Word*>(memory);
  }
};

// One head of the query as whole numbers in the order of the codes; returns what one of them is worth.
inline float round_query(float* values, const SketchLayout& layout, Word* words, float& total) {
  const int dim = layout.head_dim;
  for (int i = dim; i < round_up(dim, kWidth); ++i) values[i] = 0.0F;
  F largest = set1(0.0F);
  for (int i = 0; i < dim; i += kWidth) {
    const F x = load(values + i);
    largest = vmax(largest, vmax(x, set1(0.0F) - x));
  }
  const float reach = max_of(largest);
  // Smaller queries give every token the same weight, to the last bit.
  const float inverse = reach > 1e-30F ? 32767.0F / reach : 0.0F;
  for (int i = 0; i < dim; i += kWidth) store(values + i, round_even(load(values + i) * set1(inverse)));
  const int code_bytes = layout.code_bytes();
  int32_t sum = 0;
  for (int plane = 0; plane < layout.planes(); ++plane) {
    for (int i = 0; i < round_up(code_bytes, kWords); ++i) {
      const int at = plane * code_bytes + i;
      const int32_t value = i < code_bytes && at < dim ? static_cast<int32_t>(values[at]) : 0;
      words[(i / kWords * layout.planes() + plane) * kWords + i % kWords] = static_cast<Word>(value);
      sum += value;
    }
  }
  const float unit = reach / 32767.0F / __builtin_sqrtf(static_cast<float>(dim));
  total = static_cast<float>(sum) * unit;
  return unit;
}

inline void prepare_query(const SketchTask& task, int seq, const SketchScratch& scratch) {
  const SketchLayout& layout = task.layout;
  const size_t head_words = SketchScratch::head_words(layout);
  const size_t head_bytes = static_cast<size_t>(layout.head_dim) * value_bytes(task.q_dtype);
  const int group = task.num_heads / layout.num_kv_heads;
  for (int h = 0; h < task.heads(); ++h) {
    Word* words = scratch.query + h * head_words;
    const bool real = h < task.num_heads;
    scratch.offsets[h] = (real ? h / group : layout.num_kv_heads - 1) * layout.code_bytes();
    if (real) {
      const size_t index = static_cast<size_t>(seq) * task.num_heads + h;
      widen(task.q_dtype, static_cast<const uint8_t*>(task.q) + index * head_bytes, layout.head_dim, scratch.values);
      scratch.query_scale[h] = round_query(scratch.values, layout, words, scratch.query_sum[h]);
    } else {
      std::memset(words, 0, head_words * sizeof(Word));
      scratch.query_scale[h] = scratch.query_sum[h] = 0.0F;
    }
  }
}

// Steps and minima of `count` tokens from `token` on, for every query head.
inline void widen_ranges(const SketchTask& task, size_t token, int count, const SketchScratch& scratch) {
  const int num_kv_heads = task.layout.num_kv_heads;
  const int group = task.num_heads / num_kv_heads;
  const int total = count * num_kv_heads;
  const uint16_t* source = task.ranges + token * num_kv_heads * 2;
  float* steps = scratch.pairs;
  float* minima = scratch.pairs + SketchScratch::pair_floats(task.layout);
  F step, minimum;
  int i = 0;
  for (; i + kWidth <= total; i += kWidth) {
    load_f16_pairs(source + 2 * i, step, minimum);
    store(steps + i, step);
    store(minima + i, minimum);
  }
  uint16_t padded[2 * kWidth] = {};
  std::memcpy(padded, source + 2 * i, static_cast<size_t>(total - i) * 2 * sizeof(uint16_t));
  load_f16_pairs(padded, step, minimum);
  store(steps + i, step);
  store(minima + i, minimum);
  // Lanes behind the last head must be numbers: their query is 0.
  for (i += kWidth; i < total + kPad; ++i) steps[i] = minima[i] = 0.0F;

  for (int t = 0; t < count; ++t) {
    float* to_steps = scratch.steps + static_cast<size_t>(t) * task.heads();
    float* to_minima = scratch.minima + static_cast<size_t>(t) * task.heads();
    const float* from_steps = steps + static_cast<size_t>(t) * num_kv_heads;
    const float* from_minima = minima + static_cast<size_t>(t) * num_kv_heads;
    if (group == 1) {
      for (int h = 0; h < task.heads(); h += kWidth) {
        store(to_steps + h, load(from_steps + h));
        store(to_minima + h, load(from_minima + h));
      }
      continue;
    }
    // Every head's run is written in whole vectors; the next one writes over what is too much.
    for (int g = 0; g < num_kv_heads; ++g) {
      const int end = g + 1 < num_kv_heads ? (g + 1) * group : task.heads();
      for (int h = g * group; h < end; h += kWidth) {
        if (h + kWidth > task.heads()) {
          for (int lane = h; lane < task.heads(); ++lane) to_steps[lane] = from_steps[g], to_minima[lane] = from_minima[g];
        } else {
          store(to_steps + h, set1(from_steps[g]));
          store(to_minima + h, set1(from_minima[g]));
        }
      }
    }
  }
}

template <int kBits, int kPlane, int kShared>
inline void add_planes(Words bytes, const Word* query, size_t head_words, Sums* sums) {
  const Words codes = bits_of<kPlane * kBits, (1 << kBits) - 1>(bytes);
  for (int s = 0; s < kShared; ++s) sums[s] = add_products(sums[s], codes, query + s * head_words + kPlane * kWords);
  if constexpr ((kPlane + 1) * kBits < 8) add_planes<kBits, kPlane + 1, kShared>(bytes, query, head_words, sums);
}

// How the codes of a head are read: `whole` vectors of bytes, and one more that may be shorter.
struct CodeRuns {
  explicit CodeRuns(const SketchLayout& layout)
      : whole((layout.code_bytes() - 1) / kWords),
        last(run_of(layout.code_bytes() - whole * kWords)),
        head_words(SketchScratch::head_words(layout)) {}
  int whole;
  Run last;
  size_t head_words;
};

// Products of one token's codes with kWidth heads of the query; kShared heads in a row read the same key. kWhole is
// `runs.whole` where the compiler may know it: with the usual heads of 64 to 128 values there is no loop.
template <int kBits, int kShared, int kWhole>
inline F tile_products(const uint8_t* codes, const int32_t* offsets, const Word* query, const CodeRuns& runs) {
  constexpr int kStep = 8 / kBits * kWords;
  const int whole = kWhole < 0 ? runs.whole : kWhole;
  const size_t head_words = kWhole < 0 ? runs.head_words : (kWhole + 1) * kStep;
  Sums sums[kWidth];
#pragma GCC unroll 16
  for (int first = 0; first < kWidth; first += kShared) {
    const uint8_t* key = codes + offsets[first];
    const Word* q = query + first * head_words;
    for (int s = 0; s < kShared; ++s) sums[first + s] = no_sums();
    for (int i = 0; i < whole; ++i) {
      add_planes<kBits, 0, kShared>(load_bytes(key + i * kWords), q + i * kStep, head_words, sums + first);
    }
    add_planes<kBits, 0, kShared>(load_run(key + whole * kWords, runs.last), q + whole * kStep, head_words, sums + first);
  }
  return totals(sums);
}

// Scores of one block into weights [tokens, heads].
template <int kBits, int kShared, int kWhole>
inline void score_block(const SketchTask& task, size_t token, int count, const SketchScratch& scratch, float* weights) {
  const SketchLayout& layout = task.layout;
  const int heads = task.heads();
  const CodeRuns runs(layout);
  const size_t token_bytes = static_cast<size_t>(layout.num_kv_heads) * layout.code_bytes();
  const size_t token_ranges = 2 * static_cast<size_t>(layout.num_kv_heads);
  widen_ranges(task, token, count, scratch);
  for (int t = 0; t < count; ++t) {
    const uint8_t* codes = task.codes + (token + t) * token_bytes;
    // The hardware follows the codes, but begins anew in every page, and loses the ranges from block to block.
    const uint8_t* ahead = codes + kSketchAheadBytes;
    for (size_t i = 0; i < token_bytes; i += 64) __builtin_prefetch(ahead + i, 0, 3);
    const uint16_t* ranges = task.ranges + (token + t + kSketchBlock) * token_ranges;
    for (size_t i = 0; i < token_ranges; i += 32) __builtin_prefetch(ranges + i, 0, 3);
    for (int h = 0; h < heads; h += kWidth) {
      const F products =
          tile_products<kBits, kShared, kWhole>(codes, scratch.offsets + h, scratch.query + h * runs.head_words, runs);
      const size_t at = static_cast<size_t>(t) * heads + h;
      const F shift = load(scratch.minima + at) * load(scratch.query_sum + h);
      store(weights + at, fma(products * load(scratch.query_scale + h), load(scratch.steps + at), shift));
    }
  }
}

// Scores become weights relative to the running maximum of each head.
inline void weigh_tokens(float* weights, int count, int heads, float* maximum, float* total) {
  for (int h = 0; h < heads; h += kWidth) {
    const F before = load(maximum + h);
    F best = before;
    for (int t = 0; t < count; ++t) best = vmax(best, load(weights + static_cast<size_t>(t) * heads + h));
    F sum = load(total + h) * exp_nonpositive(before - best);
    for (int t = 0; t < count; ++t) {
      float* at = weights + static_cast<size_t>(t) * heads + h;
      const F weight = exp_nonpositive(load(at) - best);
      store(at, weight);
      sum = sum + weight;
    }
    store(maximum + h, best);
    store(total + h, sum);
  }
}

template <int kBits, int kShared, int kWhole>
void sketch_item(const SketchTask& task, int index, float* memory) {
  const Item& item = task.items[index];
  const SketchScratch scratch(task, memory);
  const auto heads = static_cast<size_t>(task.heads());
  float* maximum = task.partial_max + index * heads;
  float* total = task.partial_sum + index * heads;
  for (size_t h = 0; h < heads; ++h) maximum[h] = -3e38F, total[h] = 0.0F;
  prepare_query(task, item.seq, scratch);
  for (int i = 0; i < item.num_blocks; ++i) {
    const int first = (item.first_block + i) * kSketchBlock;
    const int left = task.lengths[item.seq] - first;
    const int count = left < kSketchBlock ? left : kSketchBlock;
    const size_t number = item.block_base + static_cast<size_t>(i);
    float* weights = task.weights + number * kSketchBlock * heads;
    score_block<kBits, kShared, kWhole>(task, static_cast<size_t>(task.starts[item.seq]) + first, count, scratch, weights);
    weigh_tokens(weights, count, task.heads(), maximum, total);
    std::memcpy(task.block_max + number * heads, maximum, heads * sizeof(float));
  }
}

template <int kBits, int kShared>
inline void sketch_item_of(const SketchTask& task, int item, float* memory) {
  switch (CodeRuns(task.layout).whole) {
    case 0: return sketch_item<kBits, kShared, 0>(task, item, memory);
    case 1: return sketch_item<kBits, kShared, 1>(task, item, memory);
    default: return sketch_item<kBits, kShared, -1>(task, item, memory);
  }
}

template <int kBits>
inline void sketch_item_of(const SketchTask& task, int item, float* memory) {
  // A tile is a whole number of runs only where four heads in a row always share a key.
  if (task.num_heads / task.layout.num_kv_heads % 4 == 0) return sketch_item_of<kBits, 4>(task, item, memory);
  return sketch_item_of<kBits, 1>(task, item, memory);
}

inline void sketch_scores(const SketchTask& task, int item, float* memory) {
  switch (task.layout.bits) {
    case 2: return sketch_item_of<2>(task, item, memory);
    case 4: return sketch_item_of<4>(task, item, memory);
    default: return sketch_item_of<8>(task, item, memory);
  }
}

// Partial results of a sequence merged: its tokens' weights, summed over the heads of each index set.
inline void sketch_finish(const SketchTask& task, int seq, float* memory) {
  const int heads = task.heads();
  float* maximum = memory;           // [heads]
  float* inverse = maximum + heads;  // [heads]: 1 / sum
  float* factor = inverse + heads;   // [heads]
  const int first_item = task.first_item[seq];
  const int last_item = task.first_item[seq + 1];
  for (int h = 0; h < heads; h += kWidth) {
    F best = load(task.partial_max + static_cast<size_t>(first_item) * heads + h);
    for (int i = first_item + 1; i < last_item; ++i) best = vmax(best, load(task.partial_max + static_cast<size_t>(i) * heads + h));
    F total = set1(0.0F);
    for (int i = first_item; i < last_item; ++i) {
      const size_t at = static_cast<size_t>(i) * heads + h;
      total = fma(exp_nonpositive(load(task.partial_max + at) - best), load(task.partial_sum + at), total);
    }
    store(maximum + h, best);
    store(inverse + h, set1(1.0F) / total);
  }
  for (int h = task.num_heads; h < heads; ++h) inverse[h] = 0.0F;

  const int length = task.lengths[seq];
  const int num_sets = task.num_sets;
  const int heads_per_set = task.num_heads / num_sets;
  float* out = task.out + static_cast<size_t>(seq) * num_sets * task.width;
  size_t number = task.items[first_item].block_base;
  for (int first = 0; first < length; first += kSketchBlock, ++number) {
    for (int h = 0; h < heads; h += kWidth) {
      const F scale = exp_nonpositive(load(task.block_max + number * heads + h) - load(maximum + h));
      store(factor + h, scale * load(inverse + h));
    }
    const int count = length - first < kSketchBlock ? length - first : kSketchBlock;
    for (int t = 0; t < count; ++t) {
      float* weights = task.weights + (number * kSketchBlock + t) * heads;
      F all = set1(0.0F);
      for (int h = 0; h < heads; h += kWidth) {
        const F weight = load(weights + h) * load(factor + h);
        store(weights + h, weight);
        all = all + weight;
      }
      if (num_sets == 1) {
        out[first + t] = sum_of(all);
        continue;
      }
      for (int set = 0; set < num_sets; ++set) {
        float sum = 0.0F;
        for (int h = set * heads_per_set; h < (set + 1) * heads_per_set; ++h) sum += weights[h];
        out[static_cast<size_t>(set) * task.width + first + t] = sum;
      }
    }
  }
  for (int set = 0; set < num_sets; ++set) {
    for (int t = length; t < task.width; ++t) out[static_cast<size_t>(set) * task.width + t] = 0.0F;
  }
}

// The part of each head's weight that lies on `count` tokens of each index set, once `sketch_finish` is through.
inline void sketch_shares(const SketchTask& task, int seq, const int32_t* positions, size_t stride, int count, float* shares,
                          float* memory) {
  const int heads = task.heads();
  const int heads_per_set = task.num_heads / task.num_sets;
  const float* weights = task.weights + task.items[task.first_item[seq]].block_base * kSketchBlock * heads;
  for (int set = 0; set < task.num_sets; ++set, positions += stride) {
    const int end = (set + 1) * heads_per_set;
    for (int h = set * heads_per_set / kWidth * kWidth; h < end; h += kWidth) {
      F sum = set1(0.0F);
      for (int i = 0; i < count; ++i) sum = sum + load(weights + static_cast<size_t>(positions[i]) * heads + h);
      store(memory + h, sum);
    }
    for (int h = set * heads_per_set; h < end; ++h) {
      // Rounding must not show where everything is read.
      shares[h] = count >= task.lengths[seq] ? 1.0F : memory[h];
    }
  }
}

}  // namespace alisa::ALISA_ISA
