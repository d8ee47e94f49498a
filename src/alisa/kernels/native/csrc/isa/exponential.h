// exp(x) for x <= 0 on whole vectors, to about 2 units in the last place; below -87 it is 0 (exp(-87) is 1e-38, and a weight
// that small is nothing next to the largest, which is 1).
//
// Range reduction x = n ln 2 + r and the degree-6 polynomial of exp on [-ln 2 / 2, ln 2 / 2].
#pragma once

#include "task.h"

namespace alisa::ALISA_ISA {

inline F exp_nonpositive(F x) {
  const F lowest = set1(-87.0F);
  const F clamped = vmax(x, lowest);
  const F n = round_even(clamped * set1(1.44269504088896341F));
  // ln 2 in two parts, the first exact when multiplied by a small integer.
  F r = fma(n, set1(-0.693359375F), clamped);
  r = fma(n, set1(2.12194440e-4F), r);
  F p = set1(1.0F / 720.0F);
  p = fma(p, r, set1(1.0F / 120.0F));
  p = fma(p, r, set1(1.0F / 24.0F));
  p = fma(p, r, set1(1.0F / 6.0F));
  p = fma(p, r, set1(0.5F));
  p = fma(p, r, set1(1.0F));
  p = fma(p, r, set1(1.0F));
  return keep_from(x, lowest, times_pow2(p, n));
}

// cap * tanh(x / cap) for cap > 0.
inline F softcapped(F x, float cap) {
  const F one = set1(1.0F);
  const F zero = set1(0.0F);
  const F faded = exp_nonpositive(vmax(x, zero - x) * set1(-2.0F / cap));
  const F size = set1(cap) * ((one - faded) / (one + faded));
  const F positive = keep_from(x, zero, size);
  return positive - (size - positive);
}

// exp_nonpositive of one number: every exponential of a call comes from one function.
inline float exp_nonpositive(float x) {
  float lanes[kWidth];
  store(lanes, exp_nonpositive(set1(x)));
  return lanes[0];
}

}  // namespace alisa::ALISA_ISA
