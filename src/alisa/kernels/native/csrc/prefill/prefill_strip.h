// A strip: six rows (heads of tokens) against the 64 keys of a block, for one instruction set: included after a
// prefill_vec_*.h.
#pragma once

namespace alisa::ALISA_PREFILL {

constexpr int kRows = 6;
constexpr int kVectors = kKeyBlock / kLanes;
constexpr int kKeyWords = kKeyBlock / kWordValues;

constexpr float kLn2 = 0.69314718055994531F;

// Words of a head.
ALISA_INLINE int head_words(int head_dim) { return (head_dim + kWordValues - 1) / kWordValues; }

// Products of a strip of queries, `words` each, with the first `kUsed` vectors of a packed block of keys.
template <int kUsed>
ALISA_INLINE void products(const uint32_t* q, const uint32_t* keys, int words, F (&scores)[kRows][kUsed]) {
  constexpr int kAtOnce = kUsed < kTogether ? kUsed : kTogether;
  static_assert(kUsed % kAtOnce == 0, "no vector is left");
  for (int first = 0; first < kUsed; first += kAtOnce) {
    F sums[kRows][kAtOnce];
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kAtOnce; ++i) sums[row][i] = zeros();
    }
    for (int word = 0; word < words; ++word) {
      Words operand[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) operand[i] = load_words(keys + word * kKeyBlock + (first + i) * kLanes);
      for (int row = 0; row < kRows; ++row) {
        const Words query = repeat(q[row * words + word]);
        for (int i = 0; i < kAtOnce; ++i) sums[row][i] = add_products(sums[row][i], query, operand[i]);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kAtOnce; ++i) scores[row][first + i] = sums[row][i];
    }
  }
}

}  // namespace alisa::ALISA_PREFILL
