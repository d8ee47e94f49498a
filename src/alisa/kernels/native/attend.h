// Decode attention over the rows of one item, in place: a partial softmax and its weighted sum of values.
//
// For every block of kBlock rows: scores of all heads from the K halves, softmax weights relative to a running maximum,
// then the weighted sum of the V halves. Each half-row is read once, from its first byte to its last, four rows side by
// side, and every K/V head serves all the query heads of its group while it is in registers. The weights of every block
// are kept: `finish` turns them into mass without computing a second exponential.
//
// The idea of merging partial softmaxes by their maximum and sum is flash decoding's (Dao-AILab/flash-attention).
#pragma once

#include "elements.h"
#include "exponential.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// What one thread needs while it attends.
struct AttendScratch {
  float* query;     // [H, head_stride], scaled by D^-0.5, padded with 0
  float* query_sum; // [H]
  float* shift;     // [H]: sum of weight * minimum, the part of the output that is the same in every dimension
  float* scales;    // [kPanel, 2 * G] (scale, minimum) of the half-rows at hand, padded

  static size_t floats(const RowLayout& layout, int num_heads) {
    return static_cast<size_t>(num_heads) * layout.head_stride() + 2 * static_cast<size_t>(num_heads) +
           kPanel * static_cast<size_t>(round_up(2 * layout.num_kv_heads, kPad));
  }
  AttendScratch(const RowLayout& layout, int num_heads, float* memory)
      : query(memory),
        query_sum(query + static_cast<size_t>(num_heads) * layout.head_stride()),
        shift(query_sum + num_heads),
        scales(shift + num_heads) {}
};

inline void prepare_query(const DecodeTask& task, int seq, const AttendScratch& scratch) {
  const RowLayout& layout = task.layout;
  const int dim = layout.head_dim;
  const size_t head_bytes = static_cast<size_t>(dim) * value_bytes(task.q_dtype);
  const float scale = 1.0F / __builtin_sqrtf(static_cast<float>(dim));
  const auto* source = static_cast<const uint8_t*>(task.q) + static_cast<size_t>(seq) * task.num_heads * head_bytes;
  for (int h = 0; h < task.num_heads; ++h) {
    float* query = scratch.query + static_cast<size_t>(h) * layout.head_stride();
    widen(task.q_dtype, source + h * head_bytes, dim, query);
    if (layout.planes() > 1) {
      // Planes lie one behind the other, each padded.
      const int plane = layout.plane_len();
      float* high = query + layout.plane_stride();
      __builtin_memmove(high, query + plane, static_cast<size_t>(dim - plane) * sizeof(float));
      for (int i = dim - plane; i < layout.plane_stride(); ++i) high[i] = 0.0F;
    }
    for (int i = layout.plane_len(); i < layout.plane_stride(); ++i) query[i] = 0.0F;
    F total = set1(0.0F);
    for (int i = 0; i < layout.head_stride(); i += kWidth) {
      const F scaled = load(query + i) * set1(scale);
      store(query + i, scaled);
      total = total + scaled;
    }
    scratch.query_sum[h] = sum_of(total);
  }
}

// The layout of a row as plain numbers, worked out once.
template <class Row>
struct Shape {
  explicit Shape(const RowLayout& layout, int num_heads)
      : group(num_heads / layout.num_kv_heads),
        plane(layout.plane_stride()),
        head(layout.head_stride()),
        whole(layout.plane_len() / kWidth),
        rest(layout.plane_len() % kWidth),
        head_bytes(layout.head_bytes()),
        half_bytes(layout.half_bytes()) {}
  int group;  // query heads for each K/V head
  int plane;  // floats from one plane to the next
  int head;   // floats from one head to the next
  int whole;  // whole vectors in a plane
  int rest;   // values behind them
  size_t head_bytes;
  size_t half_bytes;
};

// Rows that are read side by side.
struct Panel {
  const uint8_t* row[kPanel];
};

// Dot products of kPanel heads with kHeads queries: out[h * kBlock + r].
template <class Row, int kHeads>
inline void score_heads(const Panel& panel, size_t offset, const float* query, const Shape<Row>& shape, float* out) {
  F sums[kHeads][kPanel];
  for (auto& of_head : sums) {
    for (F& sum : of_head) sum = set1(0.0F);
  }
  const int whole = shape.whole;
  const auto add = [&](int index, const F(&keys)[kPanel][Row::kPlanes]) {
    for (int p = 0; p < Row::kPlanes; ++p) {
      for (int h = 0; h < kHeads; ++h) {
        const F q = load(query + h * shape.head + p * shape.plane + index * kWidth);
        for (int r = 0; r < kPanel; ++r) sums[h][r] = fma(q, keys[r][p], sums[h][r]);
      }
    }
  };
  F keys[kPanel][Row::kPlanes];
  for (int index = 0; index < whole; ++index) {
    for (int r = 0; r < kPanel; ++r) Row::load(panel.row[r] + offset, index, keys[r]);
    add(index, keys);
  }
  if (shape.rest) {
    for (int r = 0; r < kPanel; ++r) Row::tail(panel.row[r] + offset, whole, shape.rest, keys[r]);
    add(whole, keys);
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int r = 0; r < kPanel; r += 4) {
      sum4(sums[h][r], sums[h][r + 1], sums[h][r + 2], sums[h][r + 3], out + h * kBlock + r);
    }
  }
}

// acc[h] += sum over the panel of weights[h * kBlock + r] * values, for kVectors vectors of every plane.
template <class Row, int kHeads, int kVectors, class Load>
inline void add_values(const Panel& panel, int index, const float (&weights)[kHeads][kPanel], const Shape<Row>& shape,
                       float* acc, const Load& load_values) {
  F sums[kHeads][kVectors][Row::kPlanes];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p < Row::kPlanes; ++p) sums[h][v][p] = load(acc + h * shape.head + p * shape.plane + (index + v) * kWidth);
    }
  }
  for (int r = 0; r < kPanel; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      F values[Row::kPlanes];
      load_values(panel.row[r], index + v, values);
      for (int h = 0; h < kHeads; ++h) {
        for (int p = 0; p < Row::kPlanes; ++p) sums[h][v][p] = fma(set1(weights[h][r]), values[p], sums[h][v][p]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p < Row::kPlanes; ++p) store(acc + h * shape.head + p * shape.plane + (index + v) * kWidth, sums[h][v][p]);
    }
  }
}

template <class Row, int kHeads>
inline void value_heads(const Panel& panel, size_t offset, const float (&weights)[kHeads][kPanel], const Shape<Row>& shape,
                        float* acc) {
  // As many accumulators as leave registers for the values and the weights.
  constexpr int kBudget = kRegisters / 2 / (kHeads * Row::kPlanes);
  constexpr int kVectors = kBudget < 1 ? 1 : kBudget > 4 ? 4 : kBudget;
  const int whole = shape.whole;
  const auto full = [offset](const uint8_t* row, int index, F* out) { Row::load(row + offset, index, out); };
  int index = 0;
  for (; index + kVectors <= whole; index += kVectors) {
    add_values<Row, kHeads, kVectors>(panel, index, weights, shape, acc, full);
  }
  for (; index < whole; ++index) add_values<Row, kHeads, 1>(panel, index, weights, shape, acc, full);
  if (const int rest = shape.rest) {
    const auto part = [offset, rest](const uint8_t* row, int i, F* out) { Row::tail(row + offset, i, rest, out); };
    add_values<Row, kHeads, 1>(panel, whole, weights, shape, acc, part);
  }
}

// Calls body.run<n>(first) over `count` heads in tiles of kMost (4, 2 or 1) and smaller.
template <int kMost, class Body>
inline void for_head_tiles(int count, const Body& body) {
  int first = 0;
  if constexpr (kMost >= 4) {
    for (; first + 4 <= count; first += 4) body.template run<4>(first);
  }
  if constexpr (kMost >= 2) {
    for (; first + 2 <= count; first += 2) body.template run<2>(first);
  }
  for (; first < count; ++first) body.template run<1>(first);
}

template <class Row>
struct ScoreTile {
  // One accumulator for each row and head, in half of the registers.
  static constexpr int kMost = kRegisters / 2 / kPanel;
  const Panel& panel;
  size_t offset;
  const float* query;
  const Shape<Row>& shape;
  float* out;
  template <int kHeads>
  void run(int first) const {
    score_heads<Row, kHeads>(panel, offset, query + first * shape.head, shape, out + first * kBlock);
  }
};

template <class Row>
struct ValueTile {
  static constexpr int kMost = kRegisters >= 32 ? 4 : 2;
  const Panel& panel;
  size_t offset;
  const float* weights;  // [group, kBlock]
  const float* scales;   // of the panel's rows, 1 for float rows
  const Shape<Row>& shape;
  float* acc;
  template <int kHeads>
  void run(int first) const {
    float scaled[kHeads][kPanel];
    for (int h = 0; h < kHeads; ++h) {
      for (int r = 0; r < kPanel; ++r) {
        scaled[h][r] = weights[(first + h) * kBlock + r];
        if constexpr (Row::kCoded) scaled[h][r] *= scales[r];
      }
    }
    value_heads<Row, kHeads>(panel, offset, scaled, shape, acc + first * shape.head);
  }
};

// The rows of one block for one index set, and the heads that read them.
struct BlockRows {
  const uint8_t* row[kBlock + kPanel];
  int count;
  int first_kv_head;
  int num_kv_heads;
};

inline BlockRows block_rows(const DecodeTask& task, int seq, int set, int block) {
  BlockRows rows;
  const int first = block * kBlock;
  const int left = task.counts[seq] - first;
  rows.count = left < kBlock ? left : kBlock;
  const int32_t* slots = task.slots + (static_cast<size_t>(seq) * task.num_sets + set) * task.num_slots + first;
  for (int i = 0; i < rows.count; ++i) rows.row[i] = task.rows + static_cast<size_t>(slots[i]) * task.row_stride;
  // The last panel is filled up with its last row, whose weight counts once.
  for (int i = rows.count; i < round_up(rows.count, kPanel); ++i) rows.row[i] = rows.row[rows.count - 1];
  const bool shared = task.num_sets == 1;
  rows.first_kv_head = shared ? 0 : set;
  rows.num_kv_heads = shared ? task.layout.num_kv_heads : 1;
  return rows;
}

// The chunk (K or V half of a row) that is read `distance` chunks after chunk `at`; chunks of a block are its K halves,
// then its V halves.
inline const uint8_t* chunk_after(const BlockRows& rows, const BlockRows& next, size_t half_bytes, int at, int distance) {
  int chunk = at + distance;
  const int count = round_up(rows.count, kPanel);
  if (chunk < count) return rows.row[chunk];
  chunk -= count;
  if (chunk < count) return rows.row[chunk] + half_bytes;
  chunk -= count;
  const int next_count = round_up(next.count, kPanel);
  return next.row[chunk < next_count ? chunk : next_count - 1];
}

// Scale and minimum of the heads at hand, [kPanel, 2 * num_kv_heads] with a padded stride.
inline void widen_scales(const Panel& panel, size_t offset, const BlockRows& rows, int stride, float* scales) {
  offset += 4 * static_cast<size_t>(rows.first_kv_head);
  for (int r = 0; r < kPanel; ++r) {
    widen_as<Float16Row>(panel.row[r] + offset, 2 * rows.num_kv_heads, scales + r * stride);
  }
}

// The pages of rows that will be needed soon are looked up early, with one line of each: the hardware's prefetcher does the
// rest. More of it costs more than it hides (every line of a row: 20 % slower). Pieces shorter than the hardware needs to
// notice a run, as with one index set per head, are asked for in full.
inline void prefetch(const uint8_t* first, size_t bytes) {
  const size_t step = bytes > 1024 ? 4096 : 64;
  for (size_t offset = 0; offset < bytes; offset += step) __builtin_prefetch(first + offset, 0, 2);
}

template <class Row>
class BlockAttention {
 public:
  BlockAttention(const DecodeTask& task, const AttendScratch& scratch, float* acc)
      : scratch_(scratch),
        acc_(acc),
        shape_(task.layout, task.num_heads),
        scales_offset_(2 * shape_.half_bytes),
        scales_half_(4 * static_cast<size_t>(task.layout.num_kv_heads)),
        scales_stride_(round_up(2 * task.layout.num_kv_heads, kPad)),
        chunk_bytes_(shape_.head_bytes * (task.num_sets == 1 ? task.layout.num_kv_heads : 1)) {
    // Bytes in flight ahead of the reader: enough for the latency of DRAM, and little enough to stay in L2.
    constexpr size_t kAheadBytes = 32768;
    const size_t distance = kAheadBytes / chunk_bytes_;
    distance_ = distance < kPanel ? kPanel : distance > kBlock / 2 ? kBlock / 2 : static_cast<int>(distance);
  }

  // Scores of all rows into weights [H, kBlock].
  void score(const BlockRows& rows, const BlockRows& next, float* weights) const {
    const int group = shape_.group;
    for (int at = 0; at < rows.count; at += kPanel) {
      const Panel panel = panel_at(rows, next, at, at, 0);
      if constexpr (Row::kCoded) widen_scales(panel, scales_offset_, rows, scales_stride_, scratch_.scales);
      for (int i = 0; i < rows.num_kv_heads; ++i) {
        const int g = rows.first_kv_head + i;
        const size_t offset = static_cast<size_t>(g) * shape_.head_bytes;
        float* out = weights + static_cast<size_t>(g) * group * kBlock + at;
        const float* query = scratch_.query + static_cast<size_t>(g) * group * shape_.head;
        for_head_tiles<ScoreTile<Row>::kMost>(group, ScoreTile<Row>{panel, offset, query, shape_, out});
        if constexpr (Row::kCoded) {
          for (int h = 0; h < group; ++h) {
            for (int r = 0; r < kPanel; ++r) {
              const float* scale = scratch_.scales + r * scales_stride_ + 2 * i;
              out[h * kBlock + r] = out[h * kBlock + r] * scale[0] + scale[1] * scratch_.query_sum[g * group + h];
            }
          }
        }
      }
    }
  }

  // Adds the values of all rows to the accumulators.
  void accumulate(const BlockRows& rows, const BlockRows& next, const float* weights) const {
    const int group = shape_.group;
    const int chunks = round_up(rows.count, kPanel);
    for (int at = 0; at < rows.count; at += kPanel) {
      const Panel panel = panel_at(rows, next, at, chunks + at, shape_.half_bytes);
      if constexpr (Row::kCoded) {
        widen_scales(panel, scales_offset_ - shape_.half_bytes + scales_half_, rows, scales_stride_, scratch_.scales);
      }
      for (int i = 0; i < rows.num_kv_heads; ++i) {
        const int g = rows.first_kv_head + i;
        const size_t offset = static_cast<size_t>(g) * shape_.head_bytes;
        const float* of_group = weights + static_cast<size_t>(g) * group * kBlock + at;
        float scales[kPanel] = {};
        if constexpr (Row::kCoded) {
          for (int r = 0; r < kPanel; ++r) scales[r] = scratch_.scales[r * scales_stride_ + 2 * i];
          for (int h = 0; h < group; ++h) {
            float shift = 0.0F;
            for (int r = 0; r < kPanel; ++r) shift += of_group[h * kBlock + r] * scratch_.scales[r * scales_stride_ + 2 * i + 1];
            scratch_.shift[g * group + h] += shift;
          }
        }
        float* acc = acc_ + static_cast<size_t>(g) * group * shape_.head;
        for_head_tiles<ValueTile<Row>::kMost>(group, ValueTile<Row>{panel, offset, of_group, scales, shape_, acc});
      }
    }
  }

 private:
  Panel panel_at(const BlockRows& rows, const BlockRows& next, int at, int chunk, size_t offset) const {
    const size_t first_head = static_cast<size_t>(rows.first_kv_head) * shape_.head_bytes;
    Panel panel;
    for (int r = 0; r < kPanel; ++r) {
      panel.row[r] = rows.row[at + r] + offset;
      prefetch(chunk_after(rows, next, shape_.half_bytes, chunk + r, distance_) + first_head, chunk_bytes_);
    }
    return panel;
  }

  const AttendScratch& scratch_;
  float* acc_;  // [H, head]
  Shape<Row> shape_;
  size_t scales_offset_;  // in a row: pairs of K, then of V
  size_t scales_half_;    // bytes of the pairs of K
  int scales_stride_;     // floats from the scales of one row of a panel to the next
  size_t chunk_bytes_;    // of a half-row that one index set reads
  int distance_;          // chunks
};

// Scores of one head become weights relative to its running maximum; what was summed before is rescaled.
inline void weigh(float* weights, int count, float& maximum, float& total, float& shift, float* acc, int acc_len) {
  for (int i = count; i < kBlock; ++i) weights[i] = -__builtin_inff();
  F best = load(weights);
  for (int i = kWidth; i < kBlock; i += kWidth) best = vmax(best, load(weights + i));
  const float block_max = max_of(best);
  if (block_max > maximum) {
    const float rescale = exp_nonpositive(maximum - block_max);
    maximum = block_max;
    total *= rescale;
    shift *= rescale;
    for (int i = 0; i < acc_len; i += kWidth) store(acc + i, load(acc + i) * set1(rescale));
  }
  F sum = set1(0.0F);
  for (int i = 0; i < kBlock; i += kWidth) {
    const F weight = exp_nonpositive(load(weights + i) - set1(maximum));
    store(weights + i, weight);
    sum = sum + weight;
  }
  total += sum_of(sum);
}

template <class Row>
void attend_item(const DecodeTask& task, int index, float* memory) {
  const RowLayout& layout = task.layout;
  const Item& item = task.items[index];
  const int num_heads = task.num_heads;
  const int stride = layout.head_stride();
  const AttendScratch scratch(layout, num_heads, memory);
  float* acc = task.partial_out + static_cast<size_t>(index) * num_heads * stride;
  float* maximum = task.partial_max + static_cast<size_t>(index) * num_heads;
  float* total = task.partial_sum + static_cast<size_t>(index) * num_heads;
  prepare_query(task, item.seq, scratch);
  for (size_t i = 0; i < static_cast<size_t>(num_heads) * stride; ++i) acc[i] = 0.0F;
  for (int h = 0; h < num_heads; ++h) {
    maximum[h] = -__builtin_inff();
    total[h] = 0.0F;
    scratch.shift[h] = 0.0F;
  }

  const BlockAttention<Row> attention(task, scratch, acc);
  const int group = num_heads / layout.num_kv_heads;
  const int last_block = item.first_block + item.num_blocks - 1;
  BlockRows rows = block_rows(task, item.seq, 0, item.first_block);
  for (int block = item.first_block; block <= last_block; ++block) {
    const size_t number = item.block_base + static_cast<size_t>(block - item.first_block);
    float* weights = task.weights + number * num_heads * kBlock;
    for (int set = 0; set < task.num_sets; ++set) {
      const bool last_set = set + 1 == task.num_sets;
      const int next_block = last_set && block < last_block ? block + 1 : block;
      const BlockRows next = block_rows(task, item.seq, last_set ? 0 : set + 1, next_block);
      attention.score(rows, next, weights);
      for (int h = rows.first_kv_head * group; h < (rows.first_kv_head + rows.num_kv_heads) * group; ++h) {
        weigh(weights + static_cast<size_t>(h) * kBlock, rows.count, maximum[h], total[h], scratch.shift[h],
              acc + static_cast<size_t>(h) * stride, stride);
        task.block_max[number * num_heads + h] = maximum[h];
      }
      attention.accumulate(rows, next, weights);
      rows = next;
    }
  }
  if constexpr (Row::kCoded) {
    for (int h = 0; h < num_heads; ++h) {
      for (int i = 0; i < stride; i += kWidth) {
        float* at = acc + static_cast<size_t>(h) * stride + i;
        store(at, load(at) + set1(scratch.shift[h]));
      }
    }
  }
}

inline void attend(const DecodeTask& task, int item, float* scratch) {
  switch (task.layout.dtype) {
    case Dtype::kFloat32: return attend_item<Float32Row>(task, item, scratch);
    case Dtype::kBFloat16: return attend_item<BFloat16Row>(task, item, scratch);
    case Dtype::kFloat16: return attend_item<Float16Row>(task, item, scratch);
    case Dtype::kInt8: return attend_item<Int8Row>(task, item, scratch);
    case Dtype::kInt4: return attend_item<Int4Row>(task, item, scratch);
  }
}

}  // namespace alisa::ALISA_ISA
