// The activation between the two products of an MLP, and its gate, in one pass.
//
// Every element goes through the same vector instructions wherever it lies, so a token's result does not depend on the
// other tokens or on the threads. (torch's own functions treat the last elements of a thread's share in another way.)
#pragma once

#include <cstring>

#include "activation_task.h"
#include "elements.h"
#include "exponential.h"

namespace alisa::ALISA_ISA {

// Values that are widened, activated and rounded while they stay in L1.
constexpr int kActivationRun = 512;

// 1 / (1 + exp(-u)).
inline F logistic(F u) {
  const F zero = set1(0.0F);
  const F below = zero - u;
  // exp of what is not positive; 1 / (1 + e) above zero, e / (1 + e) below. NaN is in neither half.
  const F e = exp_nonpositive(vmin(u, below));
  const F positive = keep_from(u, zero, set1(1.0F));
  const F negative = keep_from(below, set1(1e-38F), e);
  return (positive + negative) / (set1(1.0F) + e);
}

// Half of erfc(z) for z >= 0, to 2e-7 of itself: the fit of Numerical Recipes (6.2), t exp(-z^2 + p(t)), t = 1 / (1 + z / 2).
inline F half_erfc(F z) {
  const F t = set1(1.0F) / fma(z, set1(0.5F), set1(1.0F));
  F p = set1(0.17087277F);
  p = fma(p, t, set1(-0.82215223F));
  p = fma(p, t, set1(1.48851587F));
  p = fma(p, t, set1(-1.13520398F));
  p = fma(p, t, set1(0.27886807F));
  p = fma(p, t, set1(-0.18628806F));
  p = fma(p, t, set1(0.09678418F));
  p = fma(p, t, set1(0.37409196F));
  p = fma(p, t, set1(1.00002368F));
  p = fma(p, t, set1(-1.26551223F));
  return t * set1(0.5F) * exp_nonpositive(p - z * z);
}

template <Activation kKind>
inline F activated(F x) {
  const F zero = set1(0.0F);
  if constexpr (kKind == Activation::kRelu) return vmax(zero, x);  // the second where one is NaN
  if constexpr (kKind == Activation::kSilu) return x * logistic(x);
  if constexpr (kKind == Activation::kGelu) {
    const F tail = half_erfc(vmax(x, zero - x) * set1(0.70710678118654752F));
    return x * (keep_from(x, zero, set1(1.0F) - tail - tail) + tail);
  }
  const F cubic = fma(x * x, set1(0.044715F), set1(1.0F));
  return x * logistic(x * cubic * set1(1.5957691216057308F));
}

template <Activation kKind>
inline void activate_all(float* x, int count) {
  for (int i = 0; i < count; i += kWidth) store(x + i, activated<kKind>(load(x + i)));
}

// `count` values, and what fills the last vector.
inline void activate_values(Activation kind, float* x, int count) {
  switch (kind) {
    case Activation::kSilu: return activate_all<Activation::kSilu>(x, count);
    case Activation::kGeluTanh: return activate_all<Activation::kGeluTanh>(x, count);
    case Activation::kGelu: return activate_all<Activation::kGelu>(x, count);
    default: return activate_all<Activation::kRelu>(x, count);
  }
}

inline void activate_run(const ActivationTask& task, const uint8_t* x, const uint8_t* gate, int count, uint8_t* out) {
  float values[kActivationRun + kWidth];
  float factors[kActivationRun + kWidth];
  std::memset(values + count, 0, kWidth * sizeof(float));  // what fills the last vector
  widen(task.dtype, x, count, values);
  activate_values(task.kind, values, count);
  if (gate != nullptr) {
    if (task.dtype != Dtype::kFloat32) {
      // As the two operators of a model in 16 bits would do: rounded before the product, too.
      uint8_t rounded[kActivationRun * 2];
      narrow(task.dtype, values, count, rounded);
      widen(task.dtype, rounded, count, values);
    }
    widen(task.dtype, gate, count, factors);
    for (int i = 0; i < count; ++i) values[i] *= factors[i];
  }
  narrow(task.dtype, values, count, out);
}

// Tokens [first, last).
inline void activate(const ActivationTask& task, int64_t first, int64_t last) {
  const int bytes = value_bytes(task.dtype);
  const size_t out_bytes = static_cast<size_t>(task.width) * bytes;
  const size_t in_bytes = task.gated ? 2 * out_bytes : out_bytes;
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* x = static_cast<const uint8_t*>(task.x) + static_cast<size_t>(n) * in_bytes;
    const uint8_t* gate = task.gated ? x + out_bytes : nullptr;
    uint8_t* out = static_cast<uint8_t*>(task.out) + static_cast<size_t>(n) * out_bytes;
    for (int i = 0; i < task.width; i += kActivationRun) {
      const size_t at = static_cast<size_t>(i) * bytes;
      activate_run(task, x + at, gate == nullptr ? nullptr : gate + at, task.width - i < kActivationRun ? task.width - i : kActivationRun, out + at);
    }
  }
}

}  // namespace alisa::ALISA_ISA
