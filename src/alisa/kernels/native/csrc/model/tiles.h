// The products of matrix.h, for one instruction set: included after a vec_*.h and the integer vectors of a model_*.cpp.
//
// A tile is some tokens times some lanes of a panel over one group of inputs, with its sums in registers. Its kinds say what
// one step of reading adds to them.
#pragma once

#include "elements.h"
#include "matrix.h"

namespace alisa::ALISA_ISA {

// Weights are asked for so long before they are needed: two groups of a panel in 8 bits.
constexpr size_t kAheadBytes = 2 * kGroup * kLanes;

// Weights that are needed later and brought near meanwhile, some lines with every step.
struct Ahead {
  const uint8_t* next;
  int lines;
  ALISA_INLINE void ask() {
    for (int line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 3);
  }
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

// What a tile reads and where its sums are: those of a token follow each other, kLanes apart.
struct TileTask {
  const uint8_t* weights;  // of the group, at the tile's first lane
  const uint16_t* ranges;  // of its first span, at that lane
  const void* x;           // [tokens, kGroup]
  const float* steps;      // [tokens]
  const int32_t* spans;    // [tokens, 2]
  float* sums;
  int count;  // inputs of the group
};

constexpr int kLineBytes = kLanes * kStepBytes;

// Float weights: every input adds its product to the sum.
template <class Kind, int kTokens, int kVectors>
inline void float_tile(const TileTask& task, Ahead ahead) {
  F total[kTokens * kVectors];
  each<kTokens * kVectors>(ALISA_BODY(i) {
    total[i.value] = load(task.sums + i.value / kVectors * kLanes + i.value % kVectors * kWidth);
  });
  const uint8_t* weights = task.weights;
  const uint8_t* x = static_cast<const uint8_t*>(task.x);
  int steps = (task.count + Kind::kInputs - 1) / Kind::kInputs;
  do {
    ahead.ask();
    typename Kind::Weights w[kVectors];
    each<kVectors>(ALISA_BODY(v) { w[v.value] = Kind::weights_at(weights + v.value * kWidth * kStepBytes); });
    each<kTokens>(ALISA_BODY(t) {
      const typename Kind::Inputs in = Kind::inputs_at(x + t.value * kGroup * Kind::kBytes);
      each<kVectors>(ALISA_BODY(v) {
        constexpr int kAt = decltype(t)::value * kVectors + decltype(v)::value;
        total[kAt] = Kind::add(total[kAt], w[v.value], in);
      });
    });
    weights += kLineBytes;
    x += Kind::kInputs * Kind::kBytes;
  } while (--steps > 0);  // at the end, or GCC holds every sum twice, and not in registers
  each<kTokens * kVectors>(ALISA_BODY(i) {
    store(task.sums + i.value / kVectors * kLanes + i.value % kVectors * kWidth, total[i.value]);
  });
}

#ifndef ALISA_BF16_ONLY

struct Float32Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kFloat32;
  static constexpr int kInputs = 1;
  static constexpr int kBytes = 4;
  using Weights = F;
  using Inputs = F;
  static ALISA_INLINE F weights_at(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static ALISA_INLINE F inputs_at(const uint8_t* p) {
    float value;
    std::memcpy(&value, p, sizeof(value));
    return set1(value);
  }
  static ALISA_INLINE F add(F sum, F w, F x) { return fma(w, x, sum); }
  template <int kTokens, int kVectors>
  static ALISA_INLINE void tile(const TileTask& task, Ahead ahead) {
    float_tile<Float32Weights, kTokens, kVectors>(task, ahead);
  }
};

struct BFloat16Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kBFloat16;
  static constexpr int kInputs = 2;
  static constexpr int kBytes = 2;
  struct Weights {
    F first, second;
  };
  using Inputs = Weights;
  static ALISA_INLINE Weights weights_at(const uint8_t* p) {
    Weights w;
    load_bf16_pairs(p, w.first, w.second);
    return w;
  }
  static ALISA_INLINE Inputs inputs_at(const uint8_t* p) {
    uint16_t pair[2];
    std::memcpy(pair, p, sizeof(pair));
    uint32_t bits[2] = {static_cast<uint32_t>(pair[0]) << 16, static_cast<uint32_t>(pair[1]) << 16};
    float values[2];
    std::memcpy(values, bits, sizeof(values));
    return {set1(values[0]), set1(values[1])};
  }
  static ALISA_INLINE F add(F sum, const Weights& w, const Inputs& x) {
    return fma(w.second, x.second, fma(w.first, x.first, sum));
  }
  template <int kTokens, int kVectors>
  static ALISA_INLINE void tile(const TileTask& task, Ahead ahead) {
    float_tile<BFloat16Weights, kTokens, kVectors>(task, ahead);
  }
};

struct Int8Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kInt8;
  static constexpr int kBytes = 1;
  template <int kTokens, int kVectors>
  static ALISA_INLINE void tile(const TileTask& task, Ahead ahead) {
    // What weights_at has left in the codes.
    constexpr auto kZero = static_cast<uint32_t>(kWeightZero);
    Ints total[kTokens * kVectors];
    each<kTokens * kVectors>(ALISA_BODY(i) {
      const int32_t* spans = task.spans + i.value / kVectors * 2;
      // Unsigned: the codes of a NaN are no codes, and its step spoils the outputs anyway.
      total[i.value] = ints(static_cast<int32_t>(0U - kZero * (static_cast<uint32_t>(spans[0]) + static_cast<uint32_t>(spans[1]))));
    });
    const uint8_t* weights = task.weights;
    const int8_t* x = static_cast<const int8_t*>(task.x);
    int quads = (task.count + 3) / 4;
    do {
      ahead.ask();
      WeightQuads w[kVectors];
      each<kVectors>(ALISA_BODY(v) { w[v.value] = weights_at(weights + v.value * kWidth * kStepBytes); });
      each<kTokens>(ALISA_BODY(t) {
        const InputQuads in = inputs_at(x + t.value * kGroup);
        each<kVectors>(ALISA_BODY(v) {
          constexpr int kAt = decltype(t)::value * kVectors + decltype(v)::value;
          total[kAt] = add_quads(total[kAt], w[v.value], in);
        });
      });
      weights += kLineBytes;
      x += 4;
    } while (--quads > 0);
    each<kTokens * kVectors>(ALISA_BODY(i) {
      constexpr int kToken = decltype(i)::value / kVectors;
      float* sum = task.sums + kToken * kLanes + decltype(i)::value % kVectors * kWidth;
      store(sum, plus(load(sum), times(set1(task.steps[kToken]), to_floats(total[i.value]))));
    });
  }
};

struct Int4Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kInt4;
  static constexpr int kBytes = 1;
  template <int kTokens, int kVectors>
  static ALISA_INLINE void tile(const TileTask& task, Ahead ahead) {
    const uint8_t* weights = task.weights;
    const int8_t* x = static_cast<const int8_t*>(task.x);
    const uint16_t* ranges = task.ranges;
    for (int span = 0; span * kSpan < task.count; ++span, ranges += 2 * kLanes) {
      NibbleSums total[kTokens * kVectors];
      each<kTokens * kVectors>(ALISA_BODY(i) { total[i.value] = no_nibbles(); });
      int octs = kSpan / 8;
      do {
        ahead.ask();
        // One half of the oct after the other: with the weights of both there are no registers for all sums.
        each<2>(ALISA_BODY(half) {
          NibbleQuads w[kVectors];
          each<kVectors>(ALISA_BODY(v) {
            w[v.value] = nibbles_at<decltype(half)::value>(weights + v.value * kWidth * kStepBytes);
          });
          each<kTokens>(ALISA_BODY(t) {
            const InputQuads in = inputs_at(x + t.value * kGroup + 4 * half.value);
            each<kVectors>(ALISA_BODY(v) {
              constexpr int kAt = decltype(t)::value * kVectors + decltype(v)::value;
              total[kAt] = add_nibbles(total[kAt], w[v.value], in);
            });
          });
        });
        weights += kLineBytes;
        x += 8;
      } while (--octs > 0);
      float codes[kTokens];
      each<kTokens>(ALISA_BODY(t) { codes[t.value] = static_cast<float>(task.spans[t.value * 2 + span]); });
      // Or GCC takes the sums of the next span from copies on the stack, which cost more than reading them again.
      asm volatile("" ::: "memory");
      each<kVectors>(ALISA_BODY(v) {
        const F scale = load_f16(ranges + v.value * kWidth);
        const F minimum = load_f16(ranges + kLanes + v.value * kWidth);
        each<kTokens>(ALISA_BODY(t) {
          constexpr int kToken = decltype(t)::value;
          constexpr int kVector = decltype(v)::value;
          const F scaled = times(scale, to_floats(whole(total[kToken * kVectors + kVector])));
          const F part = plus(scaled, times(minimum, set1(codes[kToken])));
          float* sum = task.sums + kToken * kLanes + kVector * kWidth;
          store(sum, plus(load(sum), times(set1(task.steps[kToken]), part)));
        });
      });
    }
  }
};

#endif  // ALISA_BF16_ONLY

// As many tokens as there are.
template <class Kind, int kVectors>
inline void any_tile(int tokens, const TileTask& task, Ahead ahead) {
  static_assert(kTileTokens <= 6, "a case for every number of tokens");
  switch (tokens) {
    case 1: return Kind::template tile<1, kVectors>(task, ahead);
    case 2: return Kind::template tile<2, kVectors>(task, ahead);
    case 3: return Kind::template tile<3, kVectors>(task, ahead);
    case 4: return Kind::template tile<4, kVectors>(task, ahead);
    case 5: return Kind::template tile<kTileTokens < 5 ? 1 : 5, kVectors>(task, ahead);
    default: return Kind::template tile<kTileTokens < 6 ? 1 : 6, kVectors>(task, ahead);
  }
}

// All tokens of a block for kVectors vectors of lanes of one group, from `lane` on; `asks` for weights that come later.
template <class Kind, int kVectors>
inline void group_tiles(const Matrix& matrix, const Inputs& inputs, const Tile& tile, int group, int lane, bool asks,
                        float* sums) {
  const int tokens = static_cast<int>(tile.last - tile.first);
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  const int left = matrix.num_in - group * kGroup;
  const int group_steps = kGroup / matrix.inputs_per_step();
  const uint8_t* weights =
      matrix.codes + static_cast<size_t>(tile.panel) * matrix.panel_bytes() + static_cast<size_t>(group) * group_steps * kLineBytes;
  const uint16_t* ranges = nullptr;
  if (Kind::kFormat == WeightFormat::kInt4) {
    const int span = tile.panel * matrix.spans() + group * (kGroup / kSpan);
    ranges = matrix.ranges + static_cast<size_t>(span) * 2 * kLanes + lane;
  }
  constexpr int kLines = kLineBytes / 64;
  int done = 0;
  for (int i = 0; i < tiles; ++i) {
    const int take = (tokens - done) / (tiles - i);
    // Each tile asks for its share of a group that comes later.
    const int asked = kLines * i / tiles;
    const Ahead ahead = {weights + kAheadBytes + asked * 64 * group_steps, asks ? kLines * (i + 1) / tiles - asked : 0};
    const size_t at = inputs.place(group, tile.first + done);
    const TileTask task = {weights + lane * kStepBytes,
                           ranges,
                           static_cast<const uint8_t*>(inputs.values) + at * kGroup * Kind::kBytes,
                           inputs.steps + at,
                           inputs.sums + 2 * at,
                           sums + done * kLanes + lane,
                           left < kGroup ? left : kGroup};
    any_tile<Kind, kVectors>(take, task, ahead);
    done += take;
  }
}

template <class Kind>
inline void multiply(const Matrix& matrix, const Inputs& inputs, const Tile& tile, float* sums) {
  const int tokens = static_cast<int>(tile.last - tile.first);
  std::memset(sums, 0, static_cast<size_t>(tokens) * kLanes * sizeof(float));
  const bool whole = tile.first_lane == 0 && tile.end_lane == kLanes;
  for (int group = 0; group < matrix.groups(); ++group) {
    int lane = tile.first_lane;
    if constexpr (kTileLanes >= 4 * kLaneUnit) {
      if (whole) {
        group_tiles<Kind, 4 * kLaneUnit / kWidth>(matrix, inputs, tile, group, lane, true, sums);
        continue;
      }
      if (lane + 2 * kLaneUnit <= tile.end_lane) {
        group_tiles<Kind, 2 * kLaneUnit / kWidth>(matrix, inputs, tile, group, lane, false, sums);
        lane += 2 * kLaneUnit;
      }
    }
    constexpr int kLanesAtOnce = kTileLanes < kLaneUnit ? kTileLanes : kLaneUnit;
    for (; lane < tile.end_lane; lane += kLanesAtOnce) {
      group_tiles<Kind, kLanesAtOnce / kWidth>(matrix, inputs, tile, group, lane, whole && lane == 0, sums);
    }
  }
  const int first = matrix.first_row(tile.panel);
  const int count = matrix.num_rows(tile.panel);
  float scales[kLanes];
  float bias[kLanes] = {};
  const bool scaled = Kind::kFormat == WeightFormat::kInt8;
  if (!scaled && matrix.bias == nullptr) return;
  for (float& scale : scales) scale = 1.0F;
  if (scaled) std::memcpy(scales, matrix.scales + first, static_cast<size_t>(count) * sizeof(float));
  if (matrix.bias != nullptr) std::memcpy(bias, matrix.bias + first, static_cast<size_t>(count) * sizeof(float));
  for (int token = 0; token < tokens; ++token, sums += kLanes) {
    for (int i = tile.first_lane; i < tile.end_lane; i += kWidth) {
      store(sums + i, load(sums + i) * load(scales + i) + load(bias + i));
    }
  }
}

}  // namespace alisa::ALISA_ISA
