// The two products of attention on a few rows and one part of a K/V head: q k for all of its query heads, and the weighted sum
// of v. A head has one part, or several where codes have ranges of their own: see task.h.
//
// Rows are read side by side (kPanel of them), and what is widened once serves several query heads while it is in registers.
#pragma once

#include "elements.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// The layout of K or V of a row as plain numbers, worked out once.
template <class Row>
struct Shape {
  explicit Shape(const HalfLayout& layout, int num_heads)
      : group(num_heads / layout.num_kv_heads),
        plane(layout.plane_stride()),
        head(layout.head_stride()),
        part(layout.part_stride()),
        whole(layout.plane_len() / kWidth),
        rest(layout.plane_len() % kWidth),
        part_bytes(layout.part_bytes()) {}
  int group;  // query heads for each K/V head
  int plane;  // floats from one plane to the next
  int head;   // floats from one head to the next
  int part;   // floats from one part of a head to the next
  int whole;  // whole vectors in a plane
  int rest;   // values after them
  size_t part_bytes;
};

// Dot products of kHeads queries with one part of a head of kRows rows, to `out[h * kBlock + r]`.
template <class Row, int kHeads, int kRows>
inline void score_heads(const uint8_t* const* rows, size_t offset, const float* query, const Shape<Row>& shape, float* out) {
  const uint8_t* head[kRows];  // a copy that no store can have changed, for the compiler
  for (int r = 0; r < kRows; ++r) head[r] = rows[r] + offset;
  F sums[kHeads][kRows];
  for (auto& of_head : sums) {
    for (F& sum : of_head) sum = set1(0.0F);
  }
  const auto add = [&](int index, const auto& load_keys) {
    F q[kHeads][Row::kPlanes];
    for (int h = 0; h < kHeads; ++h) {
      for (int p = 0; p < Row::kPlanes; ++p) q[h][p] = load(query + h * shape.head + p * shape.plane + index * kWidth);
    }
    for (int r = 0; r < kRows; ++r) {
      F keys[Row::kPlanes];
      load_keys(head[r], keys);
      for (int p = 0; p < Row::kPlanes; ++p) {
        for (int h = 0; h < kHeads; ++h) sums[h][r] = fma(q[h][p], keys[p], sums[h][r]);
      }
    }
  };
  for (int index = 0; index < shape.whole; ++index) {
    add(index, [index](const uint8_t* at, F* keys) { Row::load(at, index, keys); });
  }
  if (shape.rest) {
    add(shape.whole, [&shape](const uint8_t* at, F* keys) { Row::tail(at, shape.whole, shape.rest, keys); });
  }
  static_assert(kRows == 4 || kRows == 8, "sum8 writes fours");
  for (int h = 0; h < kHeads; h += 8 / kRows) {
    F eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = sums[h + i / kRows < kHeads ? h + i / kRows : h][i % kRows];
    float twice[4];  // of an odd number of heads, the last one
    float* second = kRows == 8 ? out + h * kBlock + 4 : h + 1 < kHeads ? out + (h + 1) * kBlock : twice;
    sum8(eight, out + h * kBlock, second);
  }
}

// acc[h] += sum over the panel of weights[h * kBlock + r] * values, for kVectors vectors of every plane.
template <class Row, int kHeads, int kVectors, class Load>
inline void add_values(const uint8_t* const (&head)[kPanel], int index, const float* weights, const Shape<Row>& shape, float* acc,
                       const Load& load_values) {
  F sums[kHeads][kVectors][Row::kPlanes];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      for (int p = 0; p < Row::kPlanes; ++p) sums[h][v][p] = load(acc + h * shape.head + p * shape.plane + (index + v) * kWidth);
    }
  }
  for (int r = 0; r < kPanel; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      F values[Row::kPlanes];
      load_values(head[r], index + v, values);
      for (int h = 0; h < kHeads; ++h) {
        for (int p = 0; p < Row::kPlanes; ++p) sums[h][v][p] = fma(set1(weights[h * kBlock + r]), values[p], sums[h][v][p]);
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
inline void value_heads(const uint8_t* const* rows, size_t offset, const float* weights, const Shape<Row>& shape, float* acc) {
  // As many accumulators as leave registers for the values and the weights.
  constexpr int kBudget = kSums / (kHeads * Row::kPlanes);
  constexpr int kVectors = kBudget < 1 ? 1 : kBudget > 4 ? 4 : kBudget;
  const uint8_t* head[kPanel];  // a copy, as above
  for (int r = 0; r < kPanel; ++r) head[r] = rows[r] + offset;
  const int whole = shape.whole;
  const auto full = [](const uint8_t* at, int index, F* out) { Row::load(at, index, out); };
  int index = 0;
  for (; index + kVectors <= whole; index += kVectors) {
    add_values<Row, kHeads, kVectors>(head, index, weights, shape, acc, full);
  }
  for (; index < whole; ++index) add_values<Row, kHeads, 1>(head, index, weights, shape, acc, full);
  if (const int rest = shape.rest) {
    const auto part = [rest](const uint8_t* at, int i, F* out) { Row::tail(at, i, rest, out); };
    add_values<Row, kHeads, 1>(head, whole, weights, shape, acc, part);
  }
}

// Calls body.run<n>(first) over `count` heads in tiles of kMost (4, 2 or 1) and smaller ones.
template <int kMost, class Body>
inline void for_head_tiles(int count, const Body& body) {
  int first = 0;
  if constexpr (kMost >= 4) {
    for (; first + 4 <= count; first += 4) body.template run<4>(first);
    if (first + 3 == count) return body.template run<3>(first);
  }
  if constexpr (kMost >= 2) {
    for (; first + 2 <= count; first += 2) body.template run<2>(first);
  }
  for (; first < count; ++first) body.template run<1>(first);
}

// Products of kPanel rows with all query heads of one part of a K/V head.
template <class Row>
struct ScoreTile {
  // The more heads share the widening of the keys, the fewer rows at a time share the accumulators.
  static constexpr int kMost = kSums / 4;
  const uint8_t* const* rows;
  size_t offset;
  const float* query;
  const Shape<Row>& shape;
  float* out;
  template <int kHeads>
  void run(int first) const {
    constexpr int kRows = kSums / kHeads < kPanel ? 4 : kPanel;
    for (int r = 0; r < kPanel; r += kRows) {
      score_heads<Row, kHeads, kRows>(rows + r, offset, query + first * shape.head, shape, out + first * kBlock + r);
    }
  }
};

// Weighted sums of kPanel rows for all query heads of one part of a K/V head.
template <class Row>
struct ValueTile {
  static constexpr int kMost = kSums / 4;
  const uint8_t* const* rows;
  size_t offset;
  const float* weights;  // [group, kBlock]
  const Shape<Row>& shape;
  float* acc;
  template <int kHeads>
  void run(int first) const {
    value_heads<Row, kHeads>(rows, offset, weights + first * kBlock, shape, acc + first * shape.head);
  }
};

}  // namespace alisa::ALISA_ISA
