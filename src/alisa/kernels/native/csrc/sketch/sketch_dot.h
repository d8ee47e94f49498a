// Dot products of a sketch's codes with a rounded query, as sums of products of 16-bit numbers: exact, so that every
// instruction set has the same.
//
// A vector holds 16 bytes of the codes of several tokens, as words: shifts take them apart, and what is left over of two codes
// in a word is masked. The query heads that read a key share this work, and a product of theirs is four numbers for each token
// instead of a whole vector of them, so that few steps add them up.
#pragma once

#include "task.h"

namespace alisa::ALISA_ISA {

// Bytes of a token that a vector takes, and words.
constexpr int kPieceBytes = 16;
constexpr int kPieceWords = 8;
// Vectors of tokens, and query heads, that are worked on together.
constexpr int kTokenVectors = 2;
constexpr int kTokensTogether = kTokenVectors * kTokens;
constexpr int kHeadsTogether = 4;

// Numbers after those of a token, which four heads at once may write: the next ones' come later.
constexpr int kSlack = kPad;

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
                            Sums (&sums)[kTokenVectors][kHeadsTogether]) {
  Words codes[kTokenVectors];
  for (int v = 0; v < kTokenVectors; ++v) codes[v] = bits_of<kCode * kBits, (1 << kBits) - 1>(bytes[v]);
  for (int h = 0; h < kHeads; ++h) {
    const Words factors = repeat(query + h * words + kCode * kPieceWords);
    for (int v = 0; v < kTokenVectors; ++v) sums[v][h] = add_products(sums[v][h], codes[v], factors);
  }
  if constexpr ((kCode + 1) * kBits < 16) add_piece<kBits, kHeads, kCode + 1>(bytes, query, words, sums);
}

// Products of kTokensTogether tokens, whose codes of one K/V head begin at `offset`, with kHeads query heads.
template <int kBits, int kHeads>
inline void add_tokens(const uint8_t* const* tokens, size_t offset, int code_bytes, const Word* query, size_t words,
                       int32_t* out, size_t stride) {
  constexpr int kWords = 16 / kBits * kPieceWords;
  Sums sums[kTokenVectors][kHeadsTogether];
  for (auto& of_vector : sums) {
    for (Sums& sum : of_vector) sum = no_sums();
  }
  Words bytes[kTokenVectors];
  int left = code_bytes;
  for (; left >= kPieceBytes; left -= kPieceBytes, offset += kPieceBytes, query += kWords) {
    for (int v = 0; v < kTokenVectors; ++v) bytes[v] = load_pieces(tokens + v * kTokens, offset);
    add_piece<kBits, kHeads>(bytes, query, words, sums);
  }
  if (left > 0) {
    for (int v = 0; v < kTokenVectors; ++v) bytes[v] = load_pieces(tokens + v * kTokens, offset, left);
    add_piece<kBits, kHeads>(bytes, query, words, sums);
  }
  for (int v = 0; v < kTokenVectors; ++v) store_sums(sums[v], out + v * kTokens * stride, stride);
}

// Products [count, stride] of tokens with all query heads; of `tokens`, those that fill up the last vectors are there too.
template <int kBits>
inline void block_products(const uint8_t* const* tokens, int count, const SketchLayout& layout, int group, const Word* query,
                           int32_t* out, size_t stride) {
  const size_t words = head_words(layout);
  const int code_bytes = layout.code_bytes();
  for (int t = 0; t < count; t += kTokensTogether) {
    const Word* of_head = query;
    int32_t* place = out + static_cast<size_t>(t) * stride;
    for (int g = 0; g < layout.num_kv_heads; ++g) {
      const size_t offset = static_cast<size_t>(g) * code_bytes;
      for (int h = 0, heads; h < group; h += heads, of_head += heads * words, place += heads) {
        heads = group - h < kHeadsTogether ? group - h : kHeadsTogether;
        switch (heads) {
          case 1: add_tokens<kBits, 1>(tokens + t, offset, code_bytes, of_head, words, place, stride); break;
          case 2: add_tokens<kBits, 2>(tokens + t, offset, code_bytes, of_head, words, place, stride); break;
          case 3: add_tokens<kBits, 3>(tokens + t, offset, code_bytes, of_head, words, place, stride); break;
          default: add_tokens<kBits, 4>(tokens + t, offset, code_bytes, of_head, words, place, stride); break;
        }
      }
    }
  }
}

}  // namespace alisa::ALISA_ISA
