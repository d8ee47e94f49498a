// The kernels of product.h, for one instruction set: included after a vec_*.h and the integer vectors of a product_*.cpp.
#pragma once

#include "elements.h"
#include "product.h"

namespace alisa::ALISA_ISA {

// A group whose largest input is below this is all zeros: its steps would not be normal numbers.
constexpr float kSmallest = 1e-30F;

inline void quantise_group(const uint8_t* x, Dtype dtype, int count, int8_t* codes, float* step, int32_t* start) {
  float values[kGroup];
  for (int i = count / kWidth * kWidth; i < kGroup; ++i) values[i] = 0.0F;
  widen(dtype, x, count, values);
  // As whole numbers: a NaN is then the largest, and the outputs show it.
  Ints most = ints(0);
  for (int i = 0; i < kGroup; i += kWidth) most = larger(most, magnitude_bits(load(values + i)));
  const int32_t bits = largest_of(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const bool zero = largest < kSmallest;
  *step = zero ? 0.0F : largest / 127.0F;
  const F inverse = set1(zero ? 0.0F : 127.0F / largest);
  Ints sum = ints(0);
  for (int i = 0; i < kGroup; i += kWidth) {
    const Ints code = to_ints(round_even(load(values + i) * inverse));
    store_codes(codes + i, code);
    sum = add(sum, code);
  }
  // Unsigned: the codes of a NaN are no codes, and its step spoils the outputs anyway.
  *start = static_cast<int32_t>(0U - 128U * static_cast<uint32_t>(total_of(sum)));
}

inline void quantise(const ProductTask& task, int64_t first, int64_t last) {
  const int bytes = value_bytes(task.dtype);
  for (int64_t token = first; token < last; ++token) {
    const uint8_t* x = static_cast<const uint8_t*>(task.x) + static_cast<size_t>(token) * task.x_stride;
    for (int g = 0; g < task.groups(); ++g) {
      const int left = task.num_in - g * kGroup;
      const size_t at = static_cast<size_t>(g) * static_cast<size_t>(task.num_tokens) + static_cast<size_t>(token);
      quantise_group(x + static_cast<size_t>(g) * kGroup * bytes, task.dtype, left < kGroup ? left : kGroup,
                     task.x_codes + at * kGroup, task.steps + at, task.starts + at);
    }
  }
}

constexpr int kQuadLines = kLanes * kQuad / 64;
// Weights are asked for so long before they are needed: two groups.
constexpr size_t kAheadBytes = 2 * kGroup * kLanes;

// Weights that are needed later and brought near meanwhile, some lines with every quad.
struct Ahead {
  const uint8_t* next;
  int lines;
};

// body(0) to body(kCount - 1), written out: a loop over sums leaves GCC storing them to memory in every round.
template <int kIndex>
struct Constant {
  static constexpr int value = kIndex;
};
template <int kCount, int kFirst = 0, class Body>
ALISA_INLINE void each(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(Constant<kFirst>{});
    each<kCount, kFirst + 1>(body);
  }
}
#define ALISA_BODY(index) [&](auto index) __attribute__((always_inline))

// kTokens tokens times kTileLanes outputs over one group; `sums` have a stride of kLanes.
template <int kTokens>
inline void tile(const uint8_t* weights, const int8_t* x, int quads, const float* steps, const int32_t* starts, float* sums,
                 Ahead ahead) {
  constexpr int kVectors = kTileLanes / kWidth;
  Ints total[kTokens * kVectors];
  each<kTokens * kVectors>(ALISA_BODY(i) { total[i.value] = ints(starts[i.value / kVectors]); });
  do {
    for (int line = 0; line < ahead.lines; ++line, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 3);
    Weights w[kVectors];
    each<kVectors>(ALISA_BODY(v) { w[v.value] = weights_at(weights + v.value * kWidth * kQuad); });
    each<kTokens>(ALISA_BODY(t) {
      const Inputs in = inputs_at(x + t.value * kGroup);
      each<kVectors>(ALISA_BODY(v) {
        constexpr int kAt = decltype(t)::value * kVectors + decltype(v)::value;
        total[kAt] = add_quads(total[kAt], w[v.value], in);
      });
    });
    weights += kLanes * kQuad;
    x += kQuad;
  } while (--quads > 0);  // at the end, or GCC holds every sum twice, and not in registers
  each<kTokens * kVectors>(ALISA_BODY(i) {
    constexpr int kToken = decltype(i)::value / kVectors;
    float* sum = sums + kToken * kLanes + decltype(i)::value % kVectors * kWidth;
    store(sum, plus(load(sum), times(set1(steps[kToken]), to_floats(total[i.value]))));
  });
}

inline void any_tile(int tokens, const uint8_t* weights, const int8_t* x, int quads, const float* steps,
                     const int32_t* starts, float* sums, Ahead ahead) {
  static_assert(kTileTokens <= 6, "a case for every number of tokens");
  switch (tokens) {
    case 1: return tile<1>(weights, x, quads, steps, starts, sums, ahead);
    case 2: return tile<2>(weights, x, quads, steps, starts, sums, ahead);
    case 3: return tile<3>(weights, x, quads, steps, starts, sums, ahead);
    case 4: return tile<4>(weights, x, quads, steps, starts, sums, ahead);
    case 5: return tile<kTileTokens < 5 ? 1 : 5>(weights, x, quads, steps, starts, sums, ahead);
    default: return tile<kTileTokens < 6 ? 1 : 6>(weights, x, quads, steps, starts, sums, ahead);
  }
}

// The sums of one panel, scaled, as outputs.
inline void write_panel(const ProductTask& task, int panel, int64_t first, int64_t last, const float* sums) {
  const int at = panel * kLanes;
  const int count = task.num_out - at < kLanes ? task.num_out - at : kLanes;
  const int bytes = value_bytes(task.dtype);
  float scales[kLanes] = {};
  float bias[kLanes] = {};
  std::memcpy(scales, task.scales + at, static_cast<size_t>(count) * sizeof(float));
  if (task.bias != nullptr) std::memcpy(bias, task.bias + at, static_cast<size_t>(count) * sizeof(float));
  for (int64_t token = first; token < last; ++token, sums += kLanes) {
    float values[kLanes];
    for (int i = 0; i < kLanes; i += kWidth) {
      store(values + i, plus(times(load(sums + i), load(scales + i)), load(bias + i)));
    }
    const size_t place = static_cast<size_t>(token) * static_cast<size_t>(task.num_out) + static_cast<size_t>(at);
    narrow(task.dtype, values, count, static_cast<uint8_t*>(task.out) + place * static_cast<size_t>(bytes));
  }
}

inline void multiply(const ProductTask& task, int panel, int64_t first, int64_t last, float* sums) {
  const int tokens = static_cast<int>(last - first);
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  std::memset(sums, 0, static_cast<size_t>(tokens) * kLanes * sizeof(float));
  const uint8_t* weights = task.codes + static_cast<size_t>(panel) * task.panel_bytes();
  for (int g = 0; g < task.groups(); ++g, weights += kGroup * kLanes) {
    const int left = task.quads() - g * (kGroup / kQuad);
    const int quads = left < kGroup / kQuad ? left : kGroup / kQuad;
    const size_t at = static_cast<size_t>(g) * static_cast<size_t>(task.num_tokens) + static_cast<size_t>(first);
    for (int lane = 0; lane < kLanes; lane += kTileLanes) {
      int done = 0;
      for (int i = 0; i < tiles; ++i) {
        const int take = (tokens - done) / (tiles - i);
        // Each tile asks for its share of a group that comes later.
        const int asked = kQuadLines * i / tiles;
        const int lines = lane == 0 ? kQuadLines * (i + 1) / tiles - asked : 0;
        const Ahead ahead = {weights + kAheadBytes + asked * 64 * (kGroup / kQuad), lines};
        any_tile(take, weights + lane * kQuad, task.x_codes + (at + done) * kGroup, quads, task.steps + at + done,
                 task.starts + at + done, sums + done * kLanes + lane, ahead);
        done += take;
      }
    }
  }
  write_panel(task, panel, first, last, sums);
}

}  // namespace alisa::ALISA_ISA
