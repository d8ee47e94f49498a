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

// Tokens whose codes are added up, and for each of them and each head what a code is multiplied by.
struct ValueBlock {
  const uint8_t* codes[kSketchBlock];
  const float* factors[kSketchBlock];  // [heads]
  int count;
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
  F totals[kTogether][kPlanes];
  for (int i = 0; i < kTogether; ++i) {
    for (int plane = 0; plane < kPlanes; ++plane) totals[i][plane] = load(sums + i * head_stride + plane * stride);
  }
  for (int t = 0; t < count; ++t) {
    const uint8_t* at = block.codes[t] + offset;
    const float* factors = block.factors[t] + head;
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

// The tokens of a block that one index set does not read, in the order of their positions.
struct Unread {
  const int32_t* chosen;  // ascending positions of those that it reads, from the block on
  const int32_t* end;

  Unread(const int32_t* positions, int count, int first) : chosen(positions), end(positions + count) {
    for (int32_t step = count; step > 0; step /= 2) {
      while (chosen + step <= end && chosen[step - 1] < first) chosen += step;
    }
  }
  // Their numbers in the block of `count` tokens from `first` on, to `tokens`; returns how many there are.
  int next(int first, int count, int* tokens) {
    int found = 0;
    for (int t = 0; t < count; ++t) {
      const bool reads = chosen < end && *chosen == first + t;
      tokens[found] = t;
      found += !reads;
      chosen += reads;
    }
    return found;
  }
};

// The unread tokens of one item, each index set's own; `count` tokens of each set are read, at `positions` [num_sets, stride].
// The sequence's scores are normalised.
inline void sketch_complete(const SketchTask& task, int index, const int32_t* positions, size_t stride, int chosen, float* memory) {
  const Item& item = task.items[index];
  const int length = task.lengths[item.seq];
  if (chosen >= length) return;
  const auto partial = static_cast<size_t>(task.grid.first_partial[item.seq] + item.first_block / kSketchItemBlocks);
  clear_values(task, partial);
  const SketchScratch scratch(task, memory);
  set_lanes(task, scratch.query.lanes);
  const SketchLayout& layout = task.value_layout;
  const int heads = task.heads();
  const int num_kv_heads = layout.num_kv_heads;
  const int heads_per_set = task.num_heads / task.num_sets;
  const size_t token_bytes = static_cast<size_t>(num_kv_heads) * layout.code_bytes();
  const size_t range_bytes = static_cast<size_t>(num_kv_heads) * 2 * sizeof(uint16_t);
  float* factors = scratch.factors;  // copies that no store can have changed, for the compiler
  const float* steps = scratch.steps;
  const float* minima = scratch.minima;
  float* shift = task.partial_shift + partial * heads;
  for (int set = 0; set < task.num_sets; ++set, positions += stride) {
    Unread unread(positions, chosen, item.first_block * kSketchBlock);
    const int first_head = set * heads_per_set;
    const int last_head = first_head + heads_per_set;
    for (int i = 0; i < item.num_blocks; ++i) {
      const int first = (item.first_block + i) * kSketchBlock;
      const int count = length - first < kSketchBlock ? length - first : kSketchBlock;
      int tokens[kSketchBlock];
      ValueBlock block;
      block.count = unread.next(first, count, tokens);
      if (block.count == 0) continue;
      const size_t token = static_cast<size_t>(task.starts[item.seq]) + first;
      const uint8_t* codes = task.value_codes + token * token_bytes;
      const auto* ranges = reinterpret_cast<const uint8_t*>(task.value_ranges) + token * range_bytes;
      prefetch_span(codes + kSketchAheadBytes, kSketchBlock * token_bytes);
      prefetch_span(ranges + kSketchBlock * range_bytes, kSketchBlock * range_bytes);
      widen_ranges(num_kv_heads, ranges, count, scratch);
      const size_t number = task.grid.first_block[item.seq] + static_cast<size_t>(item.first_block + i);
      const float* weights = task.weights + number * kSketchBlock * heads;
      for (int n = 0; n < block.count; ++n) {
        block.codes[n] = codes + static_cast<size_t>(tokens[n]) * token_bytes;
        block.factors[n] = factors + static_cast<size_t>(n) * heads;
      }
      for (int h = first_head / kWidth * kWidth; h < last_head; h += kWidth) {
        const int kv_head = kv_head_of(task, h);
        const Lanes lanes = lanes_at(scratch.query.lanes + h);
        F sum = set1(0.0F);
        for (int n = 0; n < block.count; ++n) {
          const F weight = load(weights + static_cast<size_t>(tokens[n]) * heads + h);
          const int from = tokens[n] * num_kv_heads + kv_head;
          sum = fma(weight, permute(load(minima + from), lanes), sum);
          store(factors + static_cast<size_t>(n) * heads + h, weight * permute(load(steps + from), lanes));
        }
        float added[kWidth];
        store(added, sum);
        for (int at = h < first_head ? first_head : h; at < last_head && at < h + kWidth; ++at) shift[at] += added[at - h];
      }
      add_heads(task, block, first_head, last_head, values_of(task, partial));
    }
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
