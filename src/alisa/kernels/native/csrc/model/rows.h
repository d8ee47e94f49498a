// What stands between the products of a layer, on one token's row of floats, for one instruction set: included after a
// vec_*.h. Rows are rounded to the model's dtype where the operators of a framework would store them.
//
// Sums over a row are made in kNormLanes runs whatever the vectors' length, so that instruction sets agree.
#pragma once

#include "activation.h"
#include "elements.h"
#include "model_isa.h"

namespace alisa::ALISA_ISA {

constexpr int kNormLanes = 16;

// A group whose largest input is below this is all zeros: its steps would not be normal numbers.
constexpr float kSmallest = 1e-30F;

inline void quantise_group(const float* x, int count, int8_t* codes, float* step, int32_t* sums) {
  float values[kGroup] = {};
  std::memcpy(values, x, static_cast<size_t>(count) * sizeof(float));
  // As whole numbers: a NaN is then the largest, and the outputs show it.
  Ints most = ints(0);
  for (int i = 0; i < kGroup; i += kWidth) most = larger(most, magnitude_bits(load(values + i)));
  const int32_t bits = largest_of(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const bool zero = largest < kSmallest;
  *step = zero ? 0.0F : largest / 127.0F;
  const F inverse = set1(zero ? 0.0F : 127.0F / largest);
  for (int span = 0; span < kGroup / kSpan; ++span) {
    Ints sum = ints(0);
    for (int i = span * kSpan; i < (span + 1) * kSpan; i += kWidth) {
      const Ints code = to_ints(round_even(load(values + i) * inverse));
      store_codes(codes + i, code);
      sum = add(sum, code);
    }
    sums[span] = total_of(sum);
  }
}

inline void prepare(WeightFormat format, const float* x, int count, int group, int64_t token, const Inputs& inputs) {
  for (; count > 0; count -= kGroup, x += kGroup, ++group) {
    const int here = count < kGroup ? count : kGroup;
    const size_t at = inputs.place(group, token);
    uint8_t* target = static_cast<uint8_t*>(inputs.values) + at * kGroup * input_bytes(format);
    if (format == WeightFormat::kInt8 || format == WeightFormat::kInt4) {
      quantise_group(x, here, reinterpret_cast<int8_t*>(target), inputs.steps + at, inputs.sums + 2 * at);
      continue;
    }
    const Dtype dtype = format == WeightFormat::kFloat32 ? Dtype::kFloat32 : Dtype::kBFloat16;
    narrow(dtype, x, here, target);
    if (here < kGroup) std::memset(target + here * input_bytes(format), 0, (kGroup - here) * input_bytes(format));
  }
}

inline void round_to(Dtype dtype, float* x, int count) {
  if (dtype == Dtype::kFloat32) return;
  constexpr int kRun = 256;
  uint8_t narrowed[kRun * 2];
  for (int i = 0; i < count; i += kRun) {
    const int here = count - i < kRun ? count - i : kRun;
    narrow(dtype, x + i, here, narrowed);
    widen(dtype, narrowed, here, x + i);
  }
}

// The sum of f(x) over a row, in an order of its own.
template <class Function>
inline float row_sum(const float* x, int count, const Function& f) {
  constexpr int kVectors = kNormLanes / kWidth;
  F total[kVectors];
  for (F& sum : total) sum = set1(0.0F);
  const int whole = count / kNormLanes * kNormLanes;
  for (int i = 0; i < whole; i += kNormLanes) {
    for (int v = 0; v < kVectors; ++v) total[v] = total[v] + f(load(x + i + v * kWidth));
  }
  float lanes[kNormLanes];
  for (int v = 0; v < kVectors; ++v) store(lanes + v * kWidth, total[v]);
  for (int i = whole; i < count; ++i) {
    float values[kWidth];
    store(values, f(set1(x[i])));
    lanes[i - whole] += values[0];
  }
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline void norm(const Norm& norm, Dtype dtype, const float* x, float* out) {
  const int count = norm.count;
  const auto size = static_cast<float>(count);
  if (norm.bias == nullptr) {
    const float squares = row_sum(x, count, [](F value) { return value * value; });
    const float inverse = 1.0F / __builtin_sqrtf(squares / size + norm.eps);
    const F factor = set1(inverse);
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) store(out + i, load(x + i) * factor * load(norm.weight + i));
    for (; i < count; ++i) out[i] = x[i] * inverse * norm.weight[i];
  } else {
    const float mean = row_sum(x, count, [](F value) { return value; }) / size;
    const F middle = set1(mean);
    const float squares = row_sum(x, count, [middle](F value) { return (value - middle) * (value - middle); });
    const float inverse = 1.0F / __builtin_sqrtf(squares / size + norm.eps);
    const F factor = set1(inverse);
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      store(out + i, (load(x + i) - middle) * factor * load(norm.weight + i) + load(norm.bias + i));
    }
    for (; i < count; ++i) out[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
  }
  round_to(dtype, out, count);
}

inline void add_row(Dtype dtype, const float* y, float scale, float* x, int count) {
  constexpr int kRun = 256;
  float scaled[kRun];
  for (int i = 0; i < count; i += kRun) {
    const int here = count - i < kRun ? count - i : kRun;
    const float* row = y + i;
    if (scale != 1.0F) {
      for (int j = 0; j < here; ++j) scaled[j] = row[j] * scale;
      round_to(dtype, scaled, here);
      row = scaled;
    }
    for (int j = 0; j < here; ++j) x[i + j] += row[j];
  }
  round_to(dtype, x, count);
}

inline void rotate(Dtype dtype, const RotationTable& table, int64_t token, float* head) {
  const int width = table.width;
  const int half = width / 2;
  const float* cos = table.cos + static_cast<size_t>(token) * width;
  const float* sin = table.sin + static_cast<size_t>(token) * width;
  int i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const F low = load(head + i);
    const F high = load(head + half + i);
    store(head + i, low * load(cos + i) + high * load(sin + i));
    store(head + half + i, high * load(cos + half + i) + low * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float low = head[i];
    const float high = head[half + i];
    head[i] = low * cos[i] + high * sin[i];
    head[half + i] = high * cos[half + i] + low * sin[half + i];
  }
  round_to(dtype, head, width);
}

inline void activate_row(Activation kind, Dtype dtype, float* x, const float* times, int count) {
  float padded[kActivationRun + kWidth];
  for (int first = 0; first < count; first += kActivationRun) {
    const int here = count - first < kActivationRun ? count - first : kActivationRun;
    std::memcpy(padded, x + first, static_cast<size_t>(here) * sizeof(float));
    std::memset(padded + here, 0, kWidth * sizeof(float));
    activate_values(kind, padded, here);
    std::memcpy(x + first, padded, static_cast<size_t>(here) * sizeof(float));
  }
  round_to(dtype, x, count);
  if (times == nullptr) return;
  for (int i = 0; i < count; ++i) x[i] *= times[i];
  round_to(dtype, x, count);
}

inline void widen_row(Dtype dtype, const void* x, int count, float* out) {
  widen(dtype, static_cast<const uint8_t*>(x), count, out);
}
inline void narrow_row(Dtype dtype, const float* x, int count, void* out) {
  narrow(dtype, x, count, static_cast<uint8_t*>(out));
}

}  // namespace alisa::ALISA_ISA
