// Approximate attention weights of every token from a low-bit copy of its keys: what ranks tokens for the current query.
//
// The query is rounded to whole numbers for each head (an error far below that of the sketch), so that its products with
// the codes are sums of small integers: sketch_dot.h. A vector holds the scores of as many tokens as it has lanes for one head,
// from the products to the softmax: however few heads a model has, no lane is idle. Weights are relative to the maximum of their
// item and stay so; one factor for each item and head makes them those of the sequence, wherever they are read.
#pragma once

#include "exponential.h"
#include "sketch_scratch.h"
#include "sketch_values.h"

namespace alisa::ALISA_ISA {

// The layout as plain numbers, worked out once: each has a division in it.
struct KeyShape {
  explicit KeyShape(const SketchTask& task)
      : num_kv_heads(task.layout.num_kv_heads),
        group(task.group()),
        code_bytes(task.layout.code_bytes()),
        words(head_words(task.layout)) {}
  int num_kv_heads;
  int group;
  int code_bytes;
  size_t words;
};

// Scores of kWidth tokens for kHeads query heads of one K/V head, the first of them `head`, into [kHeads, kSketchBlock].
template <int kBits, int kPieces, int kHeads>
inline void score_heads(const uint8_t* codes, size_t stride, const KeyShape& shape, const SketchQuery& query, int head, F step,
                        F minimum, float* scores) {
  F products[kHeads];
  const Word* words = query.words + head * shape.words;
  token_products<kBits, kHeads, kPieces>(codes, stride, shape.code_bytes, words, shape.words, products);
  for (int h = 0; h < kHeads; ++h) {
    const F of_codes = products[h] * set1(query.scale[head + h]);
    store(scores + h * kSketchBlock, fma(of_codes, step, minimum * set1(query.sum[head + h])));
  }
}

// The same for `count` heads, at most kMost.
template <int kBits, int kPieces, int kMost>
inline void score_some(const uint8_t* codes, size_t stride, const KeyShape& shape, const SketchQuery& query, int head,
                       int count, F step, F minimum, float* scores) {
  if (count == kMost) return score_heads<kBits, kPieces, kMost>(codes, stride, shape, query, head, step, minimum, scores);
  if constexpr (kMost > 1) score_some<kBits, kPieces, kMost - 1>(codes, stride, shape, query, head, count, step, minimum, scores);
}

// The codes of the last `count` tokens, in a row and with others after them that nobody asks for.
inline const uint8_t* copy_codes(const uint8_t* codes, size_t stride, int count, int code_bytes, uint8_t* copy) {
  const auto bytes = static_cast<size_t>(code_bytes);
  for (size_t t = 0; t < kWidth; ++t) std::memcpy(copy + t * bytes, codes + (t < static_cast<size_t>(count) ? t : 0) * stride, bytes);
  return copy;
}

// Scores of one block into [H, kSketchBlock].
template <int kBits, int kPieces>
inline void score_block(const SketchTask& task, const KeyShape& shape, size_t token, int count, const SketchScratch& scratch,
                        float* scores) {
  const int num_kv_heads = shape.num_kv_heads;
  const int group = shape.group;
  const size_t token_bytes = static_cast<size_t>(num_kv_heads) * shape.code_bytes;
  const size_t token_ranges = 2 * static_cast<size_t>(num_kv_heads);
  const uint8_t* codes = task.codes + token * token_bytes;
  const uint16_t* ranges = task.ranges + token * token_ranges;
  // The hardware follows the codes, but begins anew in every page, and loses the ranges from block to block.
  prefetch_span(ranges + kSketchBlock * token_ranges, kSketchBlock * token_ranges * sizeof(uint16_t));
  for (int g = 0; g < num_kv_heads; ++g) {
    turn_ranges(ranges + 2 * g, num_kv_heads, count, kSketchBlock, scratch.pairs + g * kSketchBlock);
  }
  for (int g = 0; g < num_kv_heads; ++g) {
    for (int t = 0; t < count; t += kWidth) {
      // A part at a time: more requests than a core has buffers for would wait for each other.
      prefetch_span(codes + kSketchAheadBytes + t * token_bytes + static_cast<size_t>(g) * kWidth * shape.code_bytes,
                    static_cast<size_t>(kWidth) * shape.code_bytes);
      F step, minimum;
      load_f16_pairs(scratch.pairs + g * kSketchBlock + t, step, minimum);
      const uint8_t* of_tokens = codes + t * token_bytes + static_cast<size_t>(g) * shape.code_bytes;
      size_t stride = token_bytes;
      if (count - t < kWidth) {
        of_tokens = copy_codes(of_tokens, stride, count - t, shape.code_bytes, scratch.codes);
        stride = static_cast<size_t>(shape.code_bytes);
      }
      for (int first = 0; first < group; first += kHeadsTogether) {
        const int head = g * group + first;
        const int heads = group - first < kHeadsTogether ? group - first : kHeadsTogether;
        float* of_heads = scores + static_cast<size_t>(head) * kSketchBlock + t;
        score_some<kBits, kPieces, kHeadsTogether>(of_tokens, stride, shape, scratch.query, head, heads, step, minimum, of_heads);
      }
    }
  }
}

// Scores of the parts of a head become the head's, in each of them, and all of them stay below the cap. What follows the last
// token has no weight.
inline void complete_scores(const SketchTask& task, int count, float* scores) {
  const int group = task.group();
  for (int first = 0; task.parts > 1 && first < task.num_heads; first += task.parts * group) {
    for (int i = 0; i < group * kSketchBlock; i += kWidth) {
      float* of_parts = scores + static_cast<size_t>(first) * kSketchBlock + i;
      F sum = set1(0.0F);
      for (int part = 0; part < task.parts; ++part) sum = sum + load(of_parts + static_cast<size_t>(part) * group * kSketchBlock);
      for (int part = 0; part < task.parts; ++part) store(of_parts + static_cast<size_t>(part) * group * kSketchBlock, sum);
    }
  }
  for (size_t i = 0; task.softcap > 0.0F && i < task.block_floats(); i += kWidth) {
    store(scores + i, softcapped(load(scores + i), task.softcap));
  }
  for (int h = 0; count < kSketchBlock && h < task.num_heads; ++h) {
    for (int t = count; t < kSketchBlock; ++t) scores[static_cast<size_t>(h) * kSketchBlock + t] = -3e38F;
  }
}

// Scores [num_blocks, H, kSketchBlock] of one head of an item become weights relative to the largest; returns their sum.
inline float weigh_tokens(float* scores, int num_blocks, size_t block_floats, float& maximum) {
  const float* end = scores + num_blocks * block_floats;
  F best = load(scores);
  for (const float* block = scores; block < end; block += block_floats) {
    for (int t = 0; t < kSketchBlock; t += kWidth) best = vmax(best, load(block + t));
  }
  maximum = max_of(best);
  constexpr int kVectors = kPad / kWidth;
  F sums[kVectors];
  for (F& sum : sums) sum = set1(0.0F);
  for (float* block = scores; block < end; block += block_floats) {
    for (int t = 0; t < kSketchBlock; t += kWidth) {
      const F weight = exp_nonpositive(load(block + t) - set1(maximum));
      store(block + t, weight);
      F& sum = sums[t / kWidth % kVectors];
      sum = sum + weight;
    }
  }
  return sum_lanes(sums);
}

// The query of a sequence, for all of its items.
inline void sketch_prepare(const SketchTask& task, int seq, float* memory) {
  const size_t floats = SketchQuery::floats(task.layout, task.num_heads);
  const SketchQuery query(task.heads(), task.queries + static_cast<size_t>(seq) * floats);
  prepare_query(task, seq, query, SketchScratch(task, memory).values);
}

template <int kBits, int kPieces = 0>
void sketch_item(const SketchTask& task, int index, float* memory) {
  const Item& item = task.items[index];
  SketchScratch scratch(task, memory);
  if (task.queries == nullptr) {
    prepare_query(task, item.seq, scratch.query, scratch.values);
  } else {
    const size_t floats = SketchQuery::floats(task.layout, task.num_heads);
    scratch.query = SketchQuery(task.heads(), task.queries + static_cast<size_t>(item.seq) * floats);
  }
  const KeyShape shape(task);
  const size_t block_floats = task.block_floats();
  float* weights = task.weights + (task.grid.first_block[item.seq] + static_cast<size_t>(item.first_block)) * block_floats;
  for (int i = 0; i < item.num_blocks; ++i) {
    const int first = (item.first_block + i) * kSketchBlock;
    const int left = task.lengths[item.seq] - first;
    const int count = left < kSketchBlock ? left : kSketchBlock;
    float* scores = weights + i * block_floats;
    score_block<kBits, kPieces>(task, shape, static_cast<size_t>(task.starts[item.seq]) + first, count, scratch, scores);
    complete_scores(task, count, scores);
  }
  const size_t partial = partial_of(task, item.seq, item.first_block) * task.heads();
  for (int h = 0; h < task.num_heads; ++h) {
    float* of_head = weights + static_cast<size_t>(h) * kSketchBlock;
    task.partial_sum[partial + h] = weigh_tokens(of_head, item.num_blocks, block_floats, task.partial_max[partial + h]);
  }
  for (int h = task.num_heads; h < task.heads(); ++h) task.partial_max[partial + h] = task.partial_sum[partial + h] = 0.0F;
}

inline void sketch_scores(const SketchTask& task, int item, float* memory) {
  switch (task.layout.bits) {
    case 2: return sketch_item<2>(task, item, memory);
    case 4:
      // The usual heads of 64 and 128 values.
      if (task.layout.head_dim == 64) return sketch_item<4, 2>(task, item, memory);
      if (task.layout.head_dim == 128) return sketch_item<4, 4>(task, item, memory);
      return sketch_item<4>(task, item, memory);
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
}

// The scores of `num_blocks` blocks of a sequence: its weights, summed over the heads of each index set. The first block begins
// an item; what makes the weights of each item those of the sequence is kept.
inline void sketch_normalise(const SketchTask& task, int seq, int first_block, int num_blocks, float* memory) {
  const int heads = task.heads();
  float* maximum = memory;           // [heads]
  float* inverse = maximum + heads;  // [heads]: 1 / sum
  sequence_totals(task, seq, maximum, inverse);
  const int heads_per_set = task.num_heads / task.num_sets;
  const F once = set1(1.0F / static_cast<float>(task.parts));  // every part of a head has its weight
  float* out = task.out + static_cast<size_t>(seq) * task.num_sets * task.width;
  for (int block = first_block; block < first_block + num_blocks; ++block) {
    const size_t partial = partial_of(task, seq, block) * heads;
    float* factor = task.partial_factor + partial;
    for (int h = 0; block % kSketchItemBlocks == 0 && h < heads; h += kWidth) {
      store(factor + h, exp_nonpositive(load(task.partial_max + partial + h) - load(maximum + h)) * load(inverse + h));
    }
    const int first = block * kSketchBlock;
    const int left = task.lengths[seq] - first;
    const int count = left < kSketchBlock ? left : kSketchBlock;
    const float* weights = task.weights + (task.grid.first_block[seq] + static_cast<size_t>(block)) * task.block_floats();
    for (int set = 0; set < task.num_sets; ++set) {
      float sums[kSketchBlock];
      for (int t = 0; t < kSketchBlock; t += kWidth) {
        F sum = set1(0.0F);
        for (int h = set * heads_per_set; h < (set + 1) * heads_per_set; ++h) {
          sum = fma(load(weights + static_cast<size_t>(h) * kSketchBlock + t), set1(factor[h]), sum);
        }
        store(sums + t, sum * once);
      }
      std::memcpy(out + static_cast<size_t>(set) * task.width + first, sums, static_cast<size_t>(count) * sizeof(float));
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

// Weights [num_blocks, H, kSketchBlock] of one head times the marks of their tokens.
inline float sum_marked(const float* weights, int num_blocks, size_t block_floats, const float* marks) {
  constexpr int kVectors = kPad / kWidth;
  F sums[kVectors];
  for (F& sum : sums) sum = set1(0.0F);
  for (int block = 0; block < num_blocks; ++block, weights += block_floats, marks += kSketchBlock) {
    for (int t = 0; t < kSketchBlock; t += kWidth) {
      F& sum = sums[t / kWidth % kVectors];
      sum = fma(load(weights + t), load(marks + t), sum);
    }
  }
  return sum_lanes(sums);
}

// The part of each head's weight that lies on `count` tokens of each index set, once `sketch_finish` is through.
inline void sketch_shares(const SketchTask& task, int seq, const int32_t* positions, size_t stride, int count, float* shares,
                          float* memory) {
  const int heads_per_set = task.num_heads / task.num_sets;
  const int num_blocks = (task.lengths[seq] + kSketchBlock - 1) / kSketchBlock;
  for (int h = 0; h < task.num_heads; ++h) memory[h] = 0.0F;
  float* read = memory + task.heads();  // [kSketchItemTokens]
  for (int set = 0; set < task.num_sets; ++set, positions += stride) {
    for (int block = 0; block < num_blocks; block += kSketchItemBlocks) {
      mark_tokens(positions, count, block * kSketchBlock, 0.0F, 1.0F, read);
      const int blocks = num_blocks - block < kSketchItemBlocks ? num_blocks - block : kSketchItemBlocks;
      const float* weights = task.weights + (task.grid.first_block[seq] + static_cast<size_t>(block)) * task.block_floats();
      const float* factor = task.partial_factor + partial_of(task, seq, block) * task.heads();
      for (int h = set * heads_per_set; h < (set + 1) * heads_per_set; ++h) {
        memory[h] += factor[h] * sum_marked(weights + static_cast<size_t>(h) * kSketchBlock, blocks, task.block_floats(), read);
      }
    }
  }
  for (int h = 0; h < task.num_heads; ++h) {
    // Rounding must not show where everything is read.
    if (task.offset_of(h) == 0) shares[task.head_of(h)] = count >= task.lengths[seq] ? 1.0F : memory[h];
  }
}

}  // namespace alisa::ALISA_ISA
