// A strip: six rows (heads of tokens) against the 64 keys of a block, for one instruction set: included after a
// prefill_vec_*.h.
#pragma once

namespace alisa::ALISA_ISA {

constexpr int kRows = 6;
constexpr int kVectors = kKeyBlock / kWidth;
constexpr int kKeyWords = kKeyBlock / kWordValues;

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.69314718055994531F;

// 2^x to 1e-7, 0 for -inf: a polynomial in the fraction of x (minimax in relative error over [0, 1]), scaled by its floor.
ALISA_INLINE F exp2_of(F x) {
  const F fraction = above_floor(x);
  F p = set1(0.0018775767F);
  p = fma(p, fraction, set1(0.00898934F));
  p = fma(p, fraction, set1(0.055826318F));
  p = fma(p, fraction, set1(0.24015361F));
  p = fma(p, fraction, set1(0.6931531F));
  p = fma(p, fraction, set1(0.99999994F));
  return times_pow2_floor(p, x);
}

// cap * tanh(x / cap), for cap > 0.
ALISA_INLINE F cap_scores(F x, float cap) {
  const F one = set1(1.0F);
  const F faded = exp2_of(magnitude(x) * set1(-2.0F * kLog2E / cap));
  return with_sign_of(x, set1(cap) * ((one - faded) / (one + faded)));
}

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
      for (int i = 0; i < kAtOnce; ++i) sums[row][i] = set1(0.0F);
    }
    for (int word = 0; word < words; ++word) {
      Operand operand[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) operand[i] = load_operand(keys + word * kKeyBlock + (first + i) * kWidth);
      for (int row = 0; row < kRows; ++row) {
        const Operand query = repeat(q[row * words + word]);
        for (int i = 0; i < kAtOnce; ++i) sums[row][i] = add_products(sums[row][i], query, operand[i]);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kAtOnce; ++i) scores[row][first + i] = sums[row][i];
    }
  }
}

}  // namespace alisa::ALISA_ISA
