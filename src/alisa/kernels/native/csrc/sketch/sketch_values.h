// What tokens that are not read add to the output: their approximate weights times the values that a low-bit copy keeps.
//
// Which tokens these are is known when all have been weighed and the best of them chosen. Every item then adds up those of its
// tokens that were not, whatever became of its scores meanwhile, and whoever completes a sequence adds up the items. A value is
// minimum + step * code: the codes are multiplied by weight * step, and the minima are one number for each head.
#pragma once

#include "exponential.h"
#include "sketch_scratch.h"

namespace alisa::ALISA_ISA {

template <int kBits, int kPlane = 0>
inline void unpack_codes(Codes bytes, F* planes) {
  planes[kPlane] = code_values<kPlane * kBits, (1 << kBits) - 1>(bytes);
  if constexpr ((kPlane + 1) * kBits < 8) unpack_codes<kBits, kPlane + 1>(bytes, planes);
}

// The codes of one K/V head of an item, and what those of a token are multiplied by for the query heads that share them.
struct ItemValues {
  const uint8_t* codes;
  size_t token_bytes;     // from one token to the next
  const int32_t* tokens;  // those that are not read
  int count;
  const float* factors;  // [heads, kSketchItemTokens]
  int plane_stride;
  int head_stride;
};

// A vector of dimensions from `first` on of kTogether heads, into sums [kTogether, head_stride]; of its bytes `bytes` exist.
template <int kBits, int kTogether, bool kWhole>
inline void add_vector(const ItemValues& item, int first, int bytes, float* sums) {
  constexpr int kPlanes = 8 / kBits;
  const ItemValues values = item;  // a copy that no store can have changed, for the compiler
  F totals[kTogether][kPlanes];
  for (auto& of_head : totals) {
    for (F& total : of_head) total = set1(0.0F);
  }
  for (int n = 0; n < values.count; ++n) {
    const uint8_t* at = values.codes + static_cast<size_t>(values.tokens[n]) * values.token_bytes + first;
    __builtin_prefetch(at + kSketchAheadBytes);
    const float* factors = values.factors + values.tokens[n];
    F codes[kPlanes];
    unpack_codes<kBits>(kWhole ? load_codes(at) : load_codes(at, bytes), codes);
    for (int i = 0; i < kTogether; ++i) {
      const F factor = set1(factors[i * kSketchItemTokens]);
      for (int plane = 0; plane < kPlanes; ++plane) totals[i][plane] = fma(factor, codes[plane], totals[i][plane]);
    }
  }
  for (int i = 0; i < kTogether; ++i) {
    for (int plane = 0; plane < kPlanes; ++plane) {
      store(sums + i * values.head_stride + plane * values.plane_stride + first, totals[i][plane]);
    }
  }
}

// All dimensions of `count` heads, at most kMost.
template <int kBits, int kMost>
inline void add_some(const ItemValues& item, int code_bytes, int count, float* sums) {
  if (count < kMost) {
    if constexpr (kMost > 1) add_some<kBits, kMost - 1>(item, code_bytes, count, sums);
    return;
  }
  int i = 0;
  for (; i + kWidth <= code_bytes; i += kWidth) add_vector<kBits, kMost, true>(item, i, kWidth, sums);
  if (i < code_bytes) add_vector<kBits, kMost, false>(item, i, code_bytes - i, sums);
}

// The same for all heads of a group.
template <int kBits>
inline void add_group(ItemValues item, int code_bytes, int group, float* sums) {
  // As many as have their sums in registers.
  constexpr int kMost = kSums * kBits / 8 < 4 ? kSums * kBits / 8 : 4;
  for (int h = 0; h < group; h += kMost, item.factors += kMost * kSketchItemTokens) {
    const int count = group - h < kMost ? group - h : kMost;
    add_some<kBits, kMost>(item, code_bytes, count, sums + static_cast<size_t>(h) * item.head_stride);
  }
}

inline void add_group(int bits, const ItemValues& item, int code_bytes, int group, float* sums) {
  switch (bits) {
    case 2: return add_group<2>(item, code_bytes, group, sums);
    case 4: return add_group<4>(item, code_bytes, group, sums);
    default: return add_group<8>(item, code_bytes, group, sums);
  }
}

// Sums of all heads of a partial result.
inline float* values_of(const SketchTask& task, size_t partial) {
  return task.partial_values + partial * task.num_heads * task.value_layout.head_stride();
}

// Weights [blocks, H, kSketchBlock] of one head, at their `scale`, times the steps of `count` tokens become `factors`; returns
// the weights times the minima.
inline float weigh_values(const float* weights, size_t block_floats, int count, float scale, const SketchScratch& scratch,
                          float* factors) {
  constexpr int kVectors = kPad / kWidth;
  F shifts[kVectors];
  for (F& shift : shifts) shift = set1(0.0F);
  for (int block = 0; block < count; block += kSketchBlock, weights += block_floats) {
    for (int t = 0; t < kSketchBlock; t += kWidth) {
      const F weight = load(weights + t) * set1(scale);
      store(factors + block + t, weight * load(scratch.steps + block + t));
      F& shift = shifts[t / kWidth % kVectors];
      shift = fma(weight, load(scratch.minima + block + t), shift);
    }
  }
  return sum_lanes(shifts);
}

// Numbers of the first `count` tokens that are marked; returns how many there are.
inline int list_marked(const float* marks, int count, int32_t* tokens) {
  int found = 0;
  for (int t = 0; t < count; ++t) {
    tokens[found] = t;
    found += marks[t] > 0.0F;
  }
  return found;
}

// Steps and minima of `count` tokens of one K/V head, whose ranges begin at `ranges`, and zeros up to `padded`.
inline void spread_ranges(const uint16_t* ranges, int num_kv_heads, int count, int padded, const SketchScratch& scratch) {
  turn_ranges(ranges, num_kv_heads, count, padded, scratch.pairs);
  for (int i = 0; i < padded; i += kWidth) {
    F step, minimum;
    load_f16_pairs(scratch.pairs + i, step, minimum);
    store(scratch.steps + i, step);
    store(scratch.minima + i, minimum * load(scratch.unread + i));
  }
}

// The unread tokens of one item, each index set's own; `chosen` tokens of each set are read, at `positions` [num_sets, stride].
// The sequence is normalised.
inline void sketch_complete(const SketchTask& task, int index, const int32_t* positions, size_t stride, int chosen,
                            float* memory) {
  const Item& item = task.items[index];
  if (chosen >= task.lengths[item.seq]) return;
  const SketchScratch scratch(task, memory);
  const SketchLayout& layout = task.value_layout;
  const int num_kv_heads = layout.num_kv_heads;
  const int heads_per_set = num_kv_heads / task.num_sets;
  const int group = task.group();
  const int code_bytes = layout.code_bytes();
  const int first = item.first_block * kSketchBlock;
  const int padded = item.num_blocks * kSketchBlock;
  const int left = task.lengths[item.seq] - first;
  const int count = left < padded ? left : padded;
  const size_t token = static_cast<size_t>(task.starts[item.seq]) + first;
  const uint8_t* codes = task.value_codes + token * num_kv_heads * code_bytes;
  const uint16_t* ranges = task.value_ranges + token * num_kv_heads * 2;
  const size_t range_values = static_cast<size_t>(count) * num_kv_heads * 2;
  prefetch_span(ranges + range_values, range_values * sizeof(*ranges));
  const size_t partial = partial_of(task, item.seq, item.first_block);
  const size_t number = task.grid.first_block[item.seq] + static_cast<size_t>(item.first_block);
  const float* weights = task.weights + number * task.block_floats();
  const float* scale = task.partial_factor + partial * task.heads();
  float* shift = task.partial_shift + partial * task.heads();
  float* sums = values_of(task, partial);
  int num_unread = 0;
  for (int g = 0; g < num_kv_heads; ++g) {
    if (g % heads_per_set == 0) {
      mark_tokens(positions, chosen, first, 1.0F, 0.0F, scratch.unread);
      num_unread = list_marked(scratch.unread, count, scratch.tokens);
      positions += stride;
    }
    spread_ranges(ranges + 2 * g, num_kv_heads, count, padded, scratch);
    for (int i = 0, h = g * group; i < group; ++i, ++h) {
      const float* of_head = weights + static_cast<size_t>(h) * kSketchBlock;
      float* factors = scratch.factors + i * kSketchItemTokens;
      shift[h] = weigh_values(of_head, task.block_floats(), padded, scale[h], scratch, factors);
    }
    const ItemValues values = {codes + static_cast<size_t>(g) * code_bytes, static_cast<size_t>(num_kv_heads) * code_bytes,
                               scratch.tokens, num_unread, scratch.factors, layout.plane_stride(), layout.head_stride()};
    add_group(layout.bits, values, code_bytes, group, sums + static_cast<size_t>(g) * group * values.head_stride);
  }
}

// What the tokens that are not read add to each head, [H, D], from all items; `chosen` tokens of each index set are.
inline void sketch_rest(const SketchTask& task, int seq, int chosen, float* memory) {
  const SketchLayout& layout = task.value_layout;
  const int dim = layout.head_dim;
  const int head_stride = layout.head_stride();
  const int plane_stride = layout.plane_stride();
  const int code_bytes = layout.code_bytes();
  float* rest = task.rest + static_cast<size_t>(seq) * task.num_heads * dim;
  if (chosen >= task.lengths[seq]) {
    std::memset(rest, 0, static_cast<size_t>(task.num_heads) * dim * sizeof(float));
    return;
  }
  const auto first = static_cast<size_t>(task.grid.first_partial[seq]);
  const auto last = static_cast<size_t>(task.grid.first_partial[seq + 1]);
  for (int h = 0; h < task.num_heads; ++h) {
    for (int i = 0; i < head_stride; i += kWidth) store(memory + i, set1(0.0F));
    for (size_t partial = first; partial < last; ++partial) {
      const float* sums = values_of(task, partial) + static_cast<size_t>(h) * head_stride;
      const F shift = set1(task.partial_shift[partial * task.heads() + h]);
      for (int i = 0; i < head_stride; i += kWidth) store(memory + i, load(memory + i) + (load(sums + i) + shift));
    }
    float* of_part = rest + static_cast<size_t>(task.head_of(h)) * dim * task.parts + task.offset_of(h);
    for (int plane = 0, d = 0; plane < layout.planes(); ++plane) {
      for (int i = 0; i < code_bytes && d < dim; ++i, ++d) of_part[d] = memory[plane * plane_stride + i];
    }
  }
}

}  // namespace alisa::ALISA_ISA
