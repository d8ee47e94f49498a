// Dot products of a sketch's codes with a rounded query, as sums of products of 16-bit numbers. `sketch_dot_vnni.h` has the
// same names; both are exact, so that the scores are the same to the bit.
#pragma once

#include "task.h"

namespace alisa::ALISA_ISA {

using QueryWord = Word;

// Words that a head of the query takes: [chunks, planes, kWords].
inline size_t head_words(const SketchLayout& layout) {
  const int chunks = (layout.code_bytes() + kWords - 1) / kWords;
  return static_cast<size_t>(chunks) * layout.planes() * kWords;
}

// Whole `values` of one head in the order of the codes; returns their sum.
inline int32_t put_query(const float* values, const SketchLayout& layout, int head, QueryWord* query) {
  QueryWord* words = query + static_cast<size_t>(head) * head_words(layout);
  const int code_bytes = layout.code_bytes();
  int32_t sum = 0;
  for (int first = 0; first < code_bytes; first += kWords) {
    for (int plane = 0; plane < layout.planes(); ++plane, words += kWords) {
      const int at = plane * code_bytes + first;
      const int left = code_bytes - first < layout.head_dim - at ? code_bytes - first : layout.head_dim - at;
      const int count = left < kWords ? left : kWords;
      for (int i = 0; i < count; ++i) {
        const auto value = static_cast<int32_t>(values[at + i]);
        words[i] = static_cast<QueryWord>(value);
        sum += value;
      }
      for (int i = count < 0 ? 0 : count; i < kWords; ++i) words[i] = 0;
    }
  }
  return sum;
}

template <int kBits, int kPlane, int kShared>
inline void add_planes(Words bytes, const QueryWord* query, size_t words, Sums* sums) {
  const Words codes = bits_of<kPlane * kBits, (1 << kBits) - 1>(bytes);
  for (int s = 0; s < kShared; ++s) sums[s] = add_products(sums[s], codes, query + s * words + kPlane * kWords);
  if constexpr ((kPlane + 1) * kBits < 8) add_planes<kBits, kPlane + 1, kShared>(bytes, query, words, sums);
}

// How the codes of a head are read: `whole` vectors of bytes, and the rest.
struct CodeRuns {
  explicit CodeRuns(const SketchLayout& layout)
      : whole(layout.code_bytes() / kWords),
        rest(layout.code_bytes() % kWords),
        run(run_of(rest)),
        words(head_words(layout)) {}
  // Where there is no rest, and few enough for the compiler to write them out; else -1.
  int known() const { return rest == 0 && whole <= 2 ? whole : -1; }
  int whole;
  int rest;
  Run run;
  size_t words;  // of a head of the query
};

// Products of one token's codes with kWidth heads of the query; kShared heads in a row read the same key. kWhole is
// `runs.known()`: with the usual heads of 64 to 128 values there is no loop.
template <int kBits, int kShared, int kWhole>
inline F tile_products(const uint8_t* codes, const int32_t* offsets, const QueryWord* query, const CodeRuns& runs) {
  constexpr int kStep = 8 / kBits * kWords;
  const int whole = kWhole < 0 ? runs.whole : kWhole;
  const size_t words = kWhole < 0 ? runs.words : kWhole * kStep;
  Sums sums[kWidth];
#pragma GCC unroll 16
  for (int first = 0; first < kWidth; first += kShared) {
    const uint8_t* key = codes + offsets[first];
    const QueryWord* q = query + first * words;
    for (int s = 0; s < kShared; ++s) sums[first + s] = no_sums();
    for (int i = 0; i < whole; ++i) {
      add_planes<kBits, 0, kShared>(load_bytes(key + i * kWords), q + i * kStep, words, sums + first);
    }
    if (kWhole >= 0 || runs.rest == 0) continue;
    add_planes<kBits, 0, kShared>(load_run(key + whole * kWords, runs.run), q + whole * kStep, words, sums + first);
  }
  return totals(sums);
}

}  // namespace alisa::ALISA_ISA
