// Dot products of a sketch's codes with a rounded query, as sums of products of 16-bit numbers: exact, so that every
// instruction set has the same.
//
// A vector holds 16 bytes of the codes of several tokens, as words: shifts take them apart, and what is left over of two codes
// in a word is masked. The query heads that read a key share this work. A product is four numbers for each token, so that few
// steps add up those of four vectors, to one number for each lane.
#pragma once

#include "task.h"

namespace alisa::ALISA_ISA {

// Bytes of a token that a vector takes, and words.
constexpr int kPieceBytes = 16;
constexpr int kPieceWords = 8;
// Vectors of codes that make one of products, and query heads whose sums fit into registers.
constexpr int kTokenVectors = kWidth / kTokens;
constexpr int kHeadsTogether = kSums / kTokenVectors;
static_assert(kTokenVectors == 4, "token_sums adds up four");

inline int pieces_of(const SketchLayout& layout) { return (layout.code_bytes() + kPieceBytes - 1) / kPieceBytes; }

// Words that a head of the query takes: [pieces, codes in a word, kPieceWords].
inline size_t head_words(const SketchLayout& layout) {
  return static_cast<size_t>(pieces_of(layout)) * 2 * layout.planes() * kPieceWords;
}

// Whole `values` of one head in the order of the codes; returns their sum.
inline int32_t put_query(const float* values, const SketchLayout& layout, int head, Word* query) {
  Word* words = query + static_cast<size_t>(head) * head_words(layout);
  const int planes = layout.planes();
  const int code_bytes = layout.code_bytes();
  int32_t sum = 0;
  for (int first = 0; first < code_bytes; first += kPieceBytes) {
    for (int half = 0; half < 2; ++half) {
      for (int plane = 0; plane < planes; ++plane, words += kPieceWords) {
        const int at = plane * code_bytes + first + half;
        const int end = (plane + 1) * code_bytes < layout.head_dim ? (plane + 1) * code_bytes : layout.head_dim;
        for (int i = 0; i < kPieceWords; ++i) {
          const auto value = at + 2 * i < end ? static_cast<int32_t>(values[at + 2 * i]) : 0;
          words[i] = static_cast<Word>(value);
          sum += value;
        }
      }
    }
  }
  return sum;
}

// Products of the codes number kCode, ... of every word of a piece.
template <int kBits, int kHeads, int kCode = 0>
ALISA_INLINE void add_piece(const Words (&bytes)[kTokenVectors], const Word* query, size_t words,
                            Sums (&sums)[kHeads][kTokenVectors]) {
  Words codes[kTokenVectors];
  for (int v = 0; v < kTokenVectors; ++v) codes[v] = bits_of<kCode * kBits, (1 << kBits) - 1>(bytes[v]);
  for (int h = 0; h < kHeads; ++h) {
    const Words factors = repeat(query + h * words + kCode * kPieceWords);
    for (int v = 0; v < kTokenVectors; ++v) sums[h][v] = add_products(sums[h][v], codes[v], factors);
  }
  if constexpr ((kCode + 1) * kBits < 16) add_piece<kBits, kHeads, kCode + 1>(bytes, query, words, sums);
}

// Adds the products of the first pieces of kWidth tokens, `stride` bytes apart, as many as the compiler knows that there are.
template <int kBits, int kHeads, int kPieces>
ALISA_INLINE void add_pieces(const uint8_t* codes, size_t stride, const Word* query, size_t words,
                             Sums (&sums)[kHeads][kTokenVectors]) {
  Words bytes[kTokenVectors];
  for (int v = 0; v < kTokenVectors; ++v) bytes[v] = load_pieces(codes + v * stride, kTokenVectors * stride);
  add_piece<kBits, kHeads>(bytes, query, words, sums);
  constexpr int kWords = 16 / kBits * kPieceWords;
  if constexpr (kPieces > 1) add_pieces<kBits, kHeads, kPieces - 1>(codes + kPieceBytes, stride, query + kWords, words, sums);
}

// Products of kWidth tokens, `stride` bytes apart, with kHeads query heads; the codes of one K/V head begin at `codes`. They are
// kPieces whole pieces, or any number of bytes where that is 0: a loop costs a fifth more, in moves between registers.
template <int kBits, int kHeads, int kPieces>
ALISA_INLINE void token_products(const uint8_t* codes, size_t stride, int code_bytes, const Word* query, size_t words,
                                 F (&products)[kHeads]) {
  Sums sums[kHeads][kTokenVectors];
  for (auto& of_head : sums) {
    for (Sums& sum : of_head) sum = no_sums();
  }
  if constexpr (kPieces > 0) {
    add_pieces<kBits, kHeads, kPieces>(codes, stride, query, words, sums);
  } else {
    int left = code_bytes;
    for (; left >= kPieceBytes; left -= kPieceBytes, codes += kPieceBytes, query += 16 / kBits * kPieceWords) {
      add_pieces<kBits, kHeads, 1>(codes, stride, query, words, sums);
    }
    if (left > 0) {
      Words bytes[kTokenVectors];
      for (int v = 0; v < kTokenVectors; ++v) bytes[v] = load_pieces(codes + v * stride, kTokenVectors * stride, left);
      add_piece<kBits, kHeads>(bytes, query, words, sums);
    }
  }
  for (int h = 0; h < kHeads; ++h) products[h] = token_sums(sums[h]);
}

}  // namespace alisa::ALISA_ISA
