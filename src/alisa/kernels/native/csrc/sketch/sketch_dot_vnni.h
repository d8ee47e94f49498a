// See sketch_dot.h: the same sums with VNNI, which multiplies bytes. A number of the query is two digits, 256 * high + low,
// each a byte with a sign; the codes of two heads lie side by side in a vector.
#pragma once

#include "task.h"

namespace alisa::ALISA_ISA {

using QueryWord = int8_t;

// Bytes of codes that one half of a vector takes.
constexpr int kHalf = 32;
// Heads that are worked on together: head i with head i + kPairs, so that their sums come out in order.
constexpr int kPairs = 4;
constexpr int kTogether = 2 * kPairs;
// A vector of high digits and one of low ones.
constexpr int kPairBytes = 2 * 2 * kHalf;

inline size_t chunks_of(const SketchLayout& layout) {
  return static_cast<size_t>((layout.code_bytes() + kHalf - 1) / kHalf);
}

// Bytes that a head of the query takes: heads lie in pairs, [chunks, planes, high or low, two heads, kHalf].
inline size_t head_words(const SketchLayout& layout) { return chunks_of(layout) * layout.planes() * kPairBytes / 2; }

// Whole `values` of one head in the order of the codes; returns their sum.
inline int32_t put_query(const float* values, const SketchLayout& layout, int head, QueryWord* query) {
  const int pair = head / kTogether * kPairs + head % kPairs;
  QueryWord* words = query + static_cast<size_t>(pair) * 2 * head_words(layout) + head % kTogether / kPairs * kHalf;
  const int code_bytes = layout.code_bytes();
  int32_t sum = 0;
  for (int first = 0; first < code_bytes; first += kHalf) {
    for (int plane = 0; plane < layout.planes(); ++plane, words += kPairBytes) {
      const int at = plane * code_bytes + first;
      const int left = code_bytes - first < layout.head_dim - at ? code_bytes - first : layout.head_dim - at;
      const int count = left < kHalf ? left : kHalf;
      for (int i = 0; i < count; ++i) {
        const auto value = static_cast<int32_t>(values[at + i]);
        const auto low = static_cast<QueryWord>(value);
        words[i] = static_cast<QueryWord>((value - low) >> 8);
        words[i + 2 * kHalf] = low;
        sum += value;
      }
      for (int i = count < 0 ? 0 : count; i < kHalf; ++i) words[i] = words[i + 2 * kHalf] = 0;
    }
  }
  return sum;
}

// How the codes of a head are read: `whole` halves of a vector, and the rest.
struct CodeRuns {
  explicit CodeRuns(const SketchLayout& layout)
      : whole(layout.code_bytes() / kHalf),
        rest(static_cast<__mmask32>((1ULL << (layout.code_bytes() % kHalf)) - 1)),
        words(head_words(layout)) {}
  // Where there is no rest, and few enough for the compiler to write them out; else -1.
  int known() const { return rest == 0 && whole <= 2 ? whole : -1; }
  int whole;
  __mmask32 rest;
  size_t words;  // of a head of the query
};

struct Digits {
  __m512i high, low;
};

template <int kBits, int kPlane = 0>
ALISA_INLINE void add_planes(__m512i bytes, const QueryWord* query, Digits& sums) {
  const __m512i shifted = kPlane == 0 ? bytes : _mm512_srli_epi16(bytes, kPlane * kBits);
  const __m512i codes = kBits == 8 ? bytes : _mm512_and_si512(shifted, _mm512_set1_epi8((1 << kBits) - 1));
  sums.high = _mm512_dpbusd_epi32(sums.high, codes, _mm512_load_si512(query));
  sums.low = _mm512_dpbusd_epi32(sums.low, codes, _mm512_load_si512(query + 2 * kHalf));
  if constexpr ((kPlane + 1) * kBits < 8) add_planes<kBits, kPlane + 1>(bytes, query + kPairBytes, sums);
}

inline __m512i side_by_side(__m256i first, __m256i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// Sums of kPairs pairs; where they share their keys, these are read and taken apart once.
template <int kBits, bool kShared, int kWhole>
ALISA_INLINE void pair_products(const uint8_t* codes, const int32_t* offsets, const QueryWord* query, const CodeRuns& runs,
                                __m512i* pairs) {
  constexpr int kChunk = 8 / kBits * kPairBytes;
  const int whole = kWhole < 0 ? runs.whole : kWhole;
  const size_t words = kWhole < 0 ? runs.words : kWhole * (kChunk / 2);
  const auto at = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  Digits sums[kPairs] = {};
  constexpr int kStep = kShared ? kPairs : 1;
#pragma GCC unroll 4
  for (int first = 0; first < kPairs; first += kStep) {
    const uint8_t* key = codes + offsets[first];
    const uint8_t* other = codes + offsets[first + kPairs];
    const QueryWord* q = query + static_cast<size_t>(first) * 2 * words;
    for (int i = 0; i < whole; ++i) {
      const __m512i bytes = side_by_side(at(key + i * kHalf), at(other + i * kHalf));
      for (int p = 0; p < kStep; ++p) add_planes<kBits>(bytes, q + p * 2 * words + i * kChunk, sums[first + p]);
    }
    if (kWhole >= 0 || runs.rest == 0) continue;
    const __m512i bytes = side_by_side(_mm256_maskz_loadu_epi8(runs.rest, key + whole * kHalf),
                                       _mm256_maskz_loadu_epi8(runs.rest, other + whole * kHalf));
    for (int p = 0; p < kStep; ++p) add_planes<kBits>(bytes, q + p * 2 * words + whole * kChunk, sums[first + p]);
  }
  for (int p = 0; p < kPairs; ++p) pairs[p] = _mm512_add_epi32(_mm512_slli_epi32(sums[p].high, 8), sums[p].low);
}

// In each 128 bits of the result, four sums of four numbers of pairs[0] to pairs[3].
inline __m512i sum4(const __m512i* pairs) {
  const auto two = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i low = two(pairs[0], pairs[1]);
  const __m512i high = two(pairs[2], pairs[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// Products of one token's codes with kWidth heads of the query; kShared heads in a row read the same key. kWhole is
// `runs.known()`.
template <int kBits, int kShared, int kWhole>
ALISA_INLINE F tile_products(const uint8_t* codes, const int32_t* offsets, const QueryWord* query, const CodeRuns& runs) {
  static_assert(kWidth == 2 * kTogether, "two times four pairs");
  static_assert(kShared == 1 || kShared == kPairs, "pairs share keys or do not");
  const size_t words = kWhole < 0 ? runs.words : kWhole * static_cast<size_t>(8 / kBits * kPairBytes / 2);
  __m512i pairs[kPairs];
  pair_products<kBits, kShared == kPairs, kWhole>(codes, offsets, query, runs, pairs);
  const __m512i first = sum4(pairs);
  pair_products<kBits, kShared == kPairs, kWhole>(codes, offsets + kTogether, query + kTogether * words, runs, pairs);
  const __m512i second = sum4(pairs);
  // A head's sum lies in two neighbouring 128 bits.
  return _mm512_cvtepi32_ps(
      _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xDD)));
}

}  // namespace alisa::ALISA_ISA
