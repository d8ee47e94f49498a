// What tokens that are not read add to the output: their approximate weights times the values that a low-bit copy keeps.
//
// Which tokens will not be read is known when all scores are. So every item adds up all of its tokens while their weights
// are in the cache, relative to the running maximum, whoever completes a sequence merges these sums, and what was then
// chosen, a few tokens, is taken away again: each code is read once, and those of the chosen tokens twice. A value is
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

// Tokens whose codes are added up, and for each of them and each head what a code is multiplied by.
struct ValueBlock {
  const uint8_t* codes[kSketchBlock];
  const float* factors;  // [count, heads]
  int count;
  int heads;
};

// The layout as plain numbers, worked out once: each has a division in it.
struct ValueShape {
  explicit ValueShape(const SketchTask& task)
      : group(task.group()),
        code_bytes(task.value_layout.code_bytes()),
        plane_stride(task.value_layout.plane_stride()),
        head_stride(task.value_layout.head_stride()) {}
  int group;
  int code_bytes;
  int plane_stride;
  int head_stride;
};

// Sums [planes, plane_stride] of kTogether heads that share their values have grown by the block.
template <int kBits, int kTogether, bool kWhole>
inline void add_vector(const ValueBlock& block, size_t offset, int bytes, int head, float* sums, const ValueShape shape) {
  constexpr int kPlanes = 8 / kBits;
  const int stride = shape.plane_stride;
  const int head_stride = shape.head_stride;
  const int count = block.count;
  const auto heads = static_cast<size_t>(block.heads);
  const float* factors = block.factors + head;
  F totals[kTogether][kPlanes];
  for (int i = 0; i < kTogether; ++i) {
    for (int plane = 0; plane < kPlanes; ++plane) totals[i][plane] = load(sums + i * head_stride + plane * stride);
  }
  for (int t = 0; t < count; ++t, factors += heads) {
    const uint8_t* at = block.codes[t] + offset;
    F codes[kPlanes];
    unpack_codes<kBits>(kWhole ? load_codes(at) : load_codes(at, bytes), codes);
    for (int i = 0; i < kTogether; ++i) {
      const F factor = set1(factors[i]);
      for (int plane = 0; plane < kPlanes; ++plane) totals[i][plane] = fma(factor, codes[plane], totals[i][plane]);
    }
  }
  for (int i = 0; i < kTogether; ++i) {
    for (int plane = 0; plane < kPlanes; ++plane) store(sums + i * head_stride + plane * stride, totals[i][plane]);
  }
}

// The same for all of a head's vectors.
template <int kBits, int kTogether>
inline void add_head(const ValueBlock& block, int kv_head, int head, float* sums, const ValueShape shape) {
  for (int i = 0; i < shape.code_bytes; i += kWidth) {
    const size_t offset = static_cast<size_t>(kv_head) * shape.code_bytes + i;
    if (i + kWidth <= shape.code_bytes) {
      add_vector<kBits, kTogether, true>(block, offset, kWidth, head, sums + i, shape);
    } else {
      add_vector<kBits, kTogether, false>(block, offset, shape.code_bytes - i, head, sums + i, shape);
    }
  }
}

// The same for `count` heads, at most kMost.
template <int kBits, int kMost>
inline void add_some(const ValueBlock& block, int kv_head, int head, int count, float* sums, const ValueShape shape) {
  if (count == kMost) return add_head<kBits, kMost>(block, kv_head, head, sums, shape);
  if constexpr (kMost > 1) add_some<kBits, kMost - 1>(block, kv_head, head, count, sums, shape);
}

// Sums [H, head_stride] of the heads [first, last), all those of some K/V heads, have grown by the block.
template <int kBits>
inline void add_heads(const ValueShape shape, const ValueBlock& block, int first, int last, float* sums) {
  // As many as have their sums in registers.
  constexpr int kMost = kSums * kBits / 8 < 4 ? kSums * kBits / 8 : 4;
  for (int h = first, count; h < last; h += count) {
    const int kv_head = h / shape.group;
    const int left = (kv_head + 1) * shape.group - h;
    count = left < kMost ? left : kMost;
    add_some<kBits, kMost>(block, kv_head, h, count, sums + static_cast<size_t>(h) * shape.head_stride, shape);
  }
}

inline void add_heads(const SketchTask& task, const ValueBlock& block, int first, int last, float* sums) {
  const ValueShape shape(task);
  switch (task.value_layout.bits) {
    case 2: return add_heads<2>(shape, block, first, last, sums);
    case 4: return add_heads<4>(shape, block, first, last, sums);
    default: return add_heads<8>(shape, block, first, last, sums);
  }
}

// Sums of all heads of a partial result.
inline float* values_of(const SketchTask& task, size_t partial) {
  return task.partial_values + partial * task.num_heads * task.value_layout.head_stride();
}

inline void clear_values(const SketchTask& task, size_t partial) {
  std::memset(values_of(task, partial), 0,
              static_cast<size_t>(task.num_heads) * task.value_layout.head_stride() * sizeof(float));
  std::memset(task.partial_shift + partial * task.heads(), 0, static_cast<size_t>(task.heads()) * sizeof(float));
}

inline void scale_head(float* sums, int count, float scale) {
  for (int i = 0; i < count; i += kWidth) store(sums + i, load(sums + i) * set1(scale));
}

// `count` tokens from `token` on at these weights [count, heads].
inline void add_block(const SketchTask& task, size_t token, int count, const float* weights, size_t partial,
                      const SketchScratch& scratch) {
  const SketchLayout& layout = task.value_layout;
  const int heads = task.heads();
  const size_t token_bytes = static_cast<size_t>(layout.num_kv_heads) * layout.code_bytes();
  const size_t token_ranges = 2 * static_cast<size_t>(layout.num_kv_heads);
  widen_ranges(task, task.value_ranges + token * token_ranges, count, scratch);
  float* shift = task.partial_shift + partial * heads;
  float* steps = scratch.steps;
  const float* minima = scratch.minima;
  for (int h = 0; h < heads; h += kWidth) {
    F sum = load(shift + h) * load(scratch.rescale + h);
    for (int t = 0; t < count; ++t) {
      const size_t at = static_cast<size_t>(t) * heads + h;
      const F weight = load(weights + at);
      sum = fma(weight, load(minima + at), sum);
      store(steps + at, weight * load(steps + at));
    }
    store(shift + h, sum);
  }
  float* sums = values_of(task, partial);
  const int head_stride = layout.head_stride();
  for (int h = 0; h < task.num_heads; ++h) {
    if (scratch.rescale[h] != 1.0F) scale_head(sums + static_cast<size_t>(h) * head_stride, head_stride, scratch.rescale[h]);
  }
  ValueBlock block;
  block.factors = scratch.steps;
  block.count = count;
  block.heads = heads;
  for (int t = 0; t < count; ++t) {
    block.codes[t] = task.value_codes + (token + t) * token_bytes;
    const uint8_t* ahead = block.codes[t] + kSketchAheadBytes;
    for (size_t i = 0; i < token_bytes; i += 64) __builtin_prefetch(ahead + i, 0, 3);
  }
  add_heads(task, block, 0, task.num_heads, sums);
}

// The partial results of a sequence merged into its first one, as weights of the whole sequence. `maximum` and `inverse`
// [heads] are those of the sequence, `factor` has their size.
inline void merge_values(const SketchTask& task, int seq, const float* maximum, const float* inverse, float* factor) {
  const int heads = task.heads();
  const int head_stride = task.value_layout.head_stride();
  const auto first = static_cast<size_t>(task.grid.first_partial[seq]);
  const auto last = static_cast<size_t>(task.grid.first_partial[seq + 1]);
  float* shift = task.partial_shift + first * heads;
  float* sums = values_of(task, first);
  for (size_t partial = first; partial < last; ++partial) {
    for (int h = 0; h < heads; h += kWidth) {
      const F scale = exp_nonpositive(load(task.partial_max + partial * heads + h) - load(maximum + h)) * load(inverse + h);
      const F added = load(task.partial_shift + partial * heads + h) * scale;
      store(factor + h, scale);
      store(shift + h, partial == first ? added : load(shift + h) + added);
    }
    const float* others = values_of(task, partial);
    for (int h = 0; h < task.num_heads; ++h, others += head_stride) {
      float* to = sums + static_cast<size_t>(h) * head_stride;
      if (partial == first) {
        scale_head(to, head_stride, factor[h]);
        continue;
      }
      for (int i = 0; i < head_stride; i += kWidth) store(to + i, fma(set1(factor[h]), load(others + i), load(to + i)));
    }
  }
}

// Tokens at `count` positions taken away from the sums of one K/V head's query heads.
inline void take_away(const SketchTask& task, int seq, const int32_t* positions, int count, int kv_head,
                      const SketchScratch& scratch) {
  const SketchLayout& layout = task.value_layout;
  const int heads = task.heads();
  const int first = kv_head * task.group();
  const int last = first + task.group();
  const size_t token_bytes = static_cast<size_t>(layout.num_kv_heads) * layout.code_bytes();
  const float* weights = task.weights + task.grid.first_block[seq] * kSketchBlock * heads;
  const auto partial = static_cast<size_t>(task.grid.first_partial[seq]);
  float* shift = task.partial_shift + partial * heads;
  float* steps = scratch.pairs;
  float* minima = steps + kSketchBlock;
  uint32_t gathered[kSketchBlock] = {};
  ValueBlock block;
  block.factors = scratch.steps;
  block.heads = heads;
  for (int begin = 0; begin < count; begin += kSketchBlock) {
    block.count = count - begin < kSketchBlock ? count - begin : kSketchBlock;
    for (int t = 0; t < block.count; ++t) {
      const size_t token = static_cast<size_t>(task.starts[seq]) + positions[begin + t];
      block.codes[t] = task.value_codes + token * token_bytes;
      std::memcpy(gathered + t, task.value_ranges + 2 * (token * layout.num_kv_heads + kv_head), sizeof(uint32_t));
    }
    for (int i = 0; i < block.count; i += kWidth) {
      F step, minimum;
      load_f16_pairs(gathered + i, step, minimum);
      store(steps + i, step);
      store(minima + i, minimum);
    }
    // Lanes after the last head are of no use, and are in none of the places that matter here.
    for (int h = first; h < last; h += kWidth) {
      F total = load(shift + h);
      for (int t = 0; t < block.count; ++t) {
        const F weight = load(weights + static_cast<size_t>(positions[begin + t]) * heads + h);
        store(scratch.steps + static_cast<size_t>(t) * heads + h, weight * set1(-steps[t]));
        total = total - weight * set1(minima[t]);
      }
      float lanes[kWidth];
      store(lanes, total);
      std::memcpy(shift + h, lanes, static_cast<size_t>(last - h < kWidth ? last - h : kWidth) * sizeof(float));
    }
    add_heads(task, block, first, last, values_of(task, partial));
  }
}

// What the tokens that are not read add to the query heads of one K/V head, [H, D]; `count` tokens of each index set are.
// Comes after `sketch_merge` and `sketch_normalise`.
inline void sketch_rest(const SketchTask& task, int seq, const int32_t* positions, size_t stride, int count, int kv_head,
                        float* memory) {
  const SketchLayout& layout = task.value_layout;
  const int dim = layout.head_dim;
  const int first = kv_head * task.group();
  const int last = first + task.group();
  const bool all = count >= task.lengths[seq];
  if (!all) {
    const int set = first / (task.num_heads / task.num_sets);
    take_away(task, seq, positions + static_cast<size_t>(set) * stride, count, kv_head, SketchScratch(task, memory));
  }
  float* rest = task.rest + static_cast<size_t>(seq) * task.num_heads * dim;
  const auto partial = static_cast<size_t>(task.grid.first_partial[seq]);
  const float* sums = values_of(task, partial) + static_cast<size_t>(first) * layout.head_stride();
  const float* shift = task.partial_shift + partial * task.heads();
  for (int h = first; h < last; ++h, sums += layout.head_stride()) {
    float* of_part = rest + static_cast<size_t>(task.head_of(h)) * dim * task.parts + task.offset_of(h);
    if (all) {
      std::memset(of_part, 0, static_cast<size_t>(dim) * sizeof(float));
      continue;
    }
    for (int plane = 0, d = 0; plane < layout.planes(); ++plane) {
      const float* of_plane = sums + plane * layout.plane_stride();
      for (int i = 0; i < layout.code_bytes() && d < dim; ++i, ++d) of_part[d] = of_plane[i] + shift[h];
    }
  }
}

}  // namespace alisa::ALISA_ISA
