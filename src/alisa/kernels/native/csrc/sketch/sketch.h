// Approximate attention weights of every token from a low-bit copy of its keys: what ranks tokens for the current query.
//
// The query is rounded to whole numbers for each head (an error far below that of the sketch), so that its products with
// the codes are sums of small integers: sketch_dot.h. One vector holds the scores
// of one token for as many heads as it has lanes: nothing has to be turned round between the dot products, the ranges and
// the softmax, whose maximum and sum run over tokens, lane by lane. As in attend.h, weights relative to a running maximum are kept for every block, and whoever
// completes a sequence scales them and adds up its heads. They stay where they are, for the shares of what is then chosen.
#pragma once

#include "exponential.h"
#include "sketch_scratch.h"
#include "sketch_values.h"

namespace alisa::ALISA_ISA {

// Scores of one block into weights [tokens, heads].
template <int kBits>
inline void score_block(const SketchTask& task, size_t token, int count, const SketchScratch& scratch, float* weights) {
  const SketchLayout& layout = task.layout;
  const int heads = task.heads();
  const size_t stride = SketchScratch::product_stride(heads);
  const size_t token_bytes = static_cast<size_t>(layout.num_kv_heads) * layout.code_bytes();
  const size_t token_ranges = 2 * static_cast<size_t>(layout.num_kv_heads);
  const uint8_t* tokens[kSketchBlock];
  const uint8_t* codes = task.codes + token * token_bytes;
  const uint16_t* ranges = task.ranges + token * token_ranges;
  // The hardware follows the codes, but begins anew in every page, and loses the ranges from block to block.
  prefetch_span(codes + kSketchAheadBytes, kSketchBlock * token_bytes);
  prefetch_span(ranges + kSketchBlock * token_ranges, kSketchBlock * token_ranges * sizeof(uint16_t));
  for (int t = 0; t < count; ++t) tokens[t] = codes + static_cast<size_t>(t) * token_bytes;
  for (int t = count; t < round_up(count, kTokensTogether); ++t) tokens[t] = tokens[count - 1];
  block_products<kBits>(tokens, count, layout, task.group(), scratch.query.words, scratch.products, stride);
  widen_ranges(layout.num_kv_heads, ranges, count, scratch);
  const float* steps = scratch.steps;  // copies that no store can have changed, for the compiler
  const float* minima = scratch.minima;
  const int32_t* products = scratch.products;
  for (int h = 0; h < heads; h += kWidth) {
    const F unit = load(scratch.query.scale + h);
    const F sum = load(scratch.query.sum + h);
    const Lanes lanes = lanes_at(scratch.query.lanes + h);
    const int first = kv_head_of(task, h);
    for (int t = 0; t < count; ++t) {
      const int from = t * layout.num_kv_heads + first;
      const F step = permute(load(steps + from), lanes);
      const F minimum = permute(load(minima + from), lanes);
      const F of_token = whole_numbers(products + static_cast<size_t>(t) * stride + h);
      store(weights + static_cast<size_t>(t) * heads + h, fma(of_token * unit, step, minimum * sum));
    }
  }
}

// Scores of the parts of a head become the head's, in each of them, and all of them stay below the cap.
inline void complete_scores(const SketchTask& task, int count, float* weights) {
  const int heads = task.heads();
  const int group = task.group();
  for (int t = 0; task.parts > 1 && t < count; ++t) {
    for (int first = 0; first < task.num_heads; first += task.parts * group) {
      float* of_kv_head = weights + static_cast<size_t>(t) * heads + first;
      for (int i = 0; i < group; ++i) {
        float sum = 0.0F;
        for (int part = 0; part < task.parts; ++part) sum += of_kv_head[part * group + i];
        for (int part = 0; part < task.parts; ++part) of_kv_head[part * group + i] = sum;
      }
    }
  }
  if (task.softcap <= 0.0F) return;
  for (size_t i = 0; i < static_cast<size_t>(count) * heads; i += kWidth) {
    store(weights + i, softcapped(load(weights + i), task.softcap));
  }
}

// Scores become weights relative to the running maximum of each head.
inline void weigh_tokens(float* weights, int count, int heads, float* maximum, float* total) {
  for (int h = 0; h < heads; h += kWidth) {
    const F before = load(maximum + h);
    F best = before;
    for (int t = 0; t < count; ++t) best = vmax(best, load(weights + static_cast<size_t>(t) * heads + h));
    const F scale = exp_nonpositive(before - best);
    F sum = load(total + h) * scale;
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

// The query of a sequence, for all of its items.
inline void sketch_prepare(const SketchTask& task, int seq, float* memory) {
  const size_t floats = SketchQuery::floats(task.layout, task.num_heads);
  const SketchQuery query(task.heads(), task.queries + static_cast<size_t>(seq) * floats);
  prepare_query(task, seq, query, SketchScratch(task, memory).values);
}

template <int kBits>
void sketch_item(const SketchTask& task, int index, float* memory) {
  const Item& item = task.items[index];
  SketchScratch scratch(task, memory);
  const auto heads = static_cast<size_t>(task.heads());
  const auto partial = static_cast<size_t>(task.grid.first_partial[item.seq] + item.first_block / kSketchItemBlocks);
  float* maximum = task.partial_max + partial * heads;
  float* total = task.partial_sum + partial * heads;
  for (size_t h = 0; h < heads; ++h) maximum[h] = -3e38F, total[h] = 0.0F;
  if (task.queries == nullptr) {
    prepare_query(task, item.seq, scratch.query, scratch.values);
  } else {
    const size_t floats = SketchQuery::floats(task.layout, task.num_heads);
    scratch.query = SketchQuery(task.heads(), task.queries + static_cast<size_t>(item.seq) * floats);
  }
  // Padding has no products.
  std::memset(scratch.products, 0, kSketchBlock * SketchScratch::product_stride(task.heads()) * sizeof(int32_t));
  for (int i = 0; i < item.num_blocks; ++i) {
    const int first = (item.first_block + i) * kSketchBlock;
    const int left = task.lengths[item.seq] - first;
    const int count = left < kSketchBlock ? left : kSketchBlock;
    const size_t number = task.grid.first_block[item.seq] + static_cast<size_t>(item.first_block + i);
    float* weights = task.weights + number * kSketchBlock * heads;
    const size_t token = static_cast<size_t>(task.starts[item.seq]) + first;
    score_block<kBits>(task, token, count, scratch, weights);
    complete_scores(task, count, weights);
    weigh_tokens(weights, count, task.heads(), maximum, total);
    std::memcpy(task.block_max + number * heads, maximum, heads * sizeof(float));
  }
}

inline void sketch_scores(const SketchTask& task, int item, float* memory) {
  switch (task.layout.bits) {
    case 2: return sketch_item<2>(task, item, memory);
    case 4: return sketch_item<4>(task, item, memory);
    default: return sketch_item<8>(task, item, memory);
  }
}

// The maximum [heads] of a sequence, and 1 / sum [heads] of its weights, from its partial results.
inline void sequence_totals(const SketchTask& task, int seq, float* maximum, float* inverse) {
  const int heads = task.heads();
  const int first_partial = task.grid.first_partial[seq];
  const int last_partial = task.grid.first_partial[seq + 1];
  for (int h = 0; h < heads; h += kWidth) {
    F best = load(task.partial_max + static_cast<size_t>(first_partial) * heads + h);
    for (int i = first_partial + 1; i < last_partial; ++i) best = vmax(best, load(task.partial_max + static_cast<size_t>(i) * heads + h));
    F total = set1(0.0F);
    for (int i = first_partial; i < last_partial; ++i) {
      const size_t at = static_cast<size_t>(i) * heads + h;
      total = fma(exp_nonpositive(load(task.partial_max + at) - best), load(task.partial_sum + at), total);
    }
    store(maximum + h, best);
    store(inverse + h, set1(1.0F) / total);
  }
  for (int h = task.num_heads; h < heads; ++h) inverse[h] = 0.0F;
}

// Weights of `num_blocks` blocks of a sequence become those of the whole of it, and are summed over the heads of each index
// set.
inline void sketch_normalise(const SketchTask& task, int seq, int first_block, int num_blocks, float* memory) {
  const int heads = task.heads();
  float* maximum = memory;           // [heads]
  float* inverse = maximum + heads;  // [heads]: 1 / sum
  float* factor = inverse + heads;   // [heads]
  sequence_totals(task, seq, maximum, inverse);
  const int num_sets = task.num_sets;
  const int heads_per_set = task.num_heads / num_sets;
  const float once = 1.0F / static_cast<float>(task.parts);  // every part of a head has its weight
  float* out = task.out + static_cast<size_t>(seq) * num_sets * task.width;
  for (int block = first_block; block < first_block + num_blocks; ++block) {
    const size_t number = task.grid.first_block[seq] + static_cast<size_t>(block);
    const int first = block * kSketchBlock;
    for (int h = 0; h < heads; h += kWidth) {
      const F scale = exp_nonpositive(load(task.block_max + number * heads + h) - load(maximum + h));
      store(factor + h, scale * load(inverse + h));
    }
    const int left = task.lengths[seq] - first;
    const int count = left < kSketchBlock ? left : kSketchBlock;
    float* weights = task.weights + number * kSketchBlock * heads;
    F sums[4] = {set1(0.0F), set1(0.0F), set1(0.0F), set1(0.0F)};
    for (int t = 0; t < count; ++t, weights += heads) {
      F all = set1(0.0F);
      for (int h = 0; h < heads; h += kWidth) {
        const F weight = load(weights + h) * load(factor + h);
        store(weights + h, weight);
        all = all + weight;
      }
      if (num_sets == 1) {
        sums[t % 4] = all;
        if (t % 4 == 3 || t + 1 == count) {
          float four[4];
          sum4(sums, four);
          for (int i = t / 4 * 4; i <= t; ++i) out[first + i] = four[i % 4] * once;
        }
        continue;
      }
      for (int set = 0; set < num_sets; ++set) {
        float sum = 0.0F;
        for (int h = set * heads_per_set; h < (set + 1) * heads_per_set; ++h) sum += weights[h];
        out[static_cast<size_t>(set) * task.width + first + t] = sum * once;
      }
    }
  }
}

// Partial results of a sequence merged: its tokens' weights, summed over the heads of each index set.
inline void sketch_finish(const SketchTask& task, int seq, float* memory) {
  const int length = task.lengths[seq];
  sketch_normalise(task, seq, 0, (length + kSketchBlock - 1) / kSketchBlock, memory);
  float* out = task.out + static_cast<size_t>(seq) * task.num_sets * task.width;
  for (int set = 0; set < task.num_sets; ++set) {
    for (int t = length; t < task.width; ++t) out[static_cast<size_t>(set) * task.width + t] = 0.0F;
  }
}

// The part of each head's weight that lies on `count` tokens of each index set, once `sketch_finish` is through.
inline void sketch_shares(const SketchTask& task, int seq, const int32_t* positions, size_t stride, int count, float* shares,
                          float* memory) {
  const int heads = task.heads();
  const int heads_per_set = task.num_heads / task.num_sets;
  const float* weights = task.weights + task.grid.first_block[seq] * kSketchBlock * heads;
  for (int set = 0; set < task.num_sets; ++set, positions += stride) {
    const int end = (set + 1) * heads_per_set;
    for (int h = set * heads_per_set / kWidth * kWidth; h < end; h += kWidth) {
      F sum = set1(0.0F);
      for (int i = 0; i < count; ++i) sum = sum + load(weights + static_cast<size_t>(positions[i]) * heads + h);
      store(memory + h, sum);
    }
    for (int h = set * heads_per_set; h < end; ++h) {
      if (task.offset_of(h) > 0) continue;
      // Rounding must not show where everything is read.
      shares[task.head_of(h)] = count >= task.lengths[seq] ? 1.0F : memory[h];
    }
  }
}

}  // namespace alisa::ALISA_ISA
