// The layers of a model for any CPU.
#define ALISA_ISA portable
#include "vec_portable.h"

namespace alisa::ALISA_ISA {

using Ints = I;
// Byte i of every quad.
struct WeightQuads {
  I byte[4];
};
struct InputQuads {
  int32_t byte[4];
};
constexpr int kTileTokens = 4;
constexpr int kTileLanes = 8;

inline Ints ints(int32_t x) { return I{x, x, x, x}; }
inline Ints add(Ints a, Ints b) { return a + b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline int32_t largest_of(Ints x) {
  int32_t best = x[0];
  for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
inline int32_t total_of(Ints x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline Ints magnitude_bits(F x) { return bits<I>(x) & 0x7fffffff; }
// 0 for a NaN, which has no whole number.
inline Ints to_ints(F x) { return __builtin_convertvector(bits<F>(bits<I>(x) & (x == x)), I); }
inline F to_floats(Ints x) { return __builtin_convertvector(x, F); }
inline F plus(F a, F b) { return a + b; }
inline F times(F a, F b) { return a * b; }
inline void store_codes(int8_t* p, Ints x) { store_bytes(p, x & 255); }

constexpr int32_t kWeightZero = 128;
inline WeightQuads weights_at(const uint8_t* p) {
  const U quads = read<U>(p);
  WeightQuads w;
  for (int i = 0; i < 4; ++i) w.byte[i] = bits<I>((quads >> (8 * i)) & 255U);
  return w;
}
inline InputQuads inputs_at(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Ints add_quads(Ints sum, const WeightQuads& w, const InputQuads& x) {
  return sum + ((w.byte[0] * x.byte[0] + w.byte[1] * x.byte[1]) + (w.byte[2] * x.byte[2] + w.byte[3] * x.byte[3]));
}

using NibbleSums = Ints;
using NibbleQuads = WeightQuads;
inline NibbleSums no_nibbles() { return ints(0); }
template <int kHigh>
inline NibbleQuads nibbles_at(const uint8_t* p) {
  NibbleQuads w = weights_at(p);
  for (auto& bytes : w.byte) bytes = kHigh ? bytes >> 4 : bytes & 15;
  return w;
}
inline NibbleSums add_nibbles(NibbleSums sums, const NibbleQuads& w, const InputQuads& x) { return add_quads(sums, w, x); }
inline Ints whole(NibbleSums sums) { return sums; }

}  // namespace alisa::ALISA_ISA

// The vectors come first.
#include "model_table.h"

namespace alisa {

const ModelIsa kModelPortable = portable::model_table("portable");

}  // namespace alisa
