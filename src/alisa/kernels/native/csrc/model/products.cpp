// See products.h, and model_isa.h for the choice of the instruction set.
#include "products.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace alisa {
namespace {

// Products below this many bytes of weights times tokens are made by the calling thread alone: waking another takes a few
// microseconds.
constexpr size_t kSerialWork = 1 << 17;

#ifdef ALISA_X86
// The kernels of AVX-512 with VNNI, with other products.
const ModelIsa& with_bf16() {
  static const ModelIsa isa = [] {
    ModelIsa paired = kModelVnni;
    paired.name = "avx512_bf16";
    paired.multiply[static_cast<int>(WeightFormat::kBFloat16)] = kMultiplyBf16;
    return paired;
  }();
  return isa;
}
#endif

}  // namespace

const ModelIsa* find_model_isa(const char* name) {
#ifdef ALISA_X86
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512_bf16") == 0) {
    return find_isa("avx512_vnni") != nullptr && __builtin_cpu_supports("avx512bf16") ? &with_bf16() : nullptr;
  }
  if (std::strcmp(name, kModelVnni.name) == 0) return find_isa("avx512_vnni") != nullptr ? &kModelVnni : nullptr;
  if (std::strcmp(name, kModelAvx2.name) == 0) return find_isa("avx2") != nullptr ? &kModelAvx2 : nullptr;
#endif
  return std::strcmp(name, kModelPortable.name) == 0 ? &kModelPortable : nullptr;
}

Inputs InputBuffer::room(WeightFormat format, int num_in, int64_t num_tokens) {
  const auto places = static_cast<size_t>((num_in + kGroup - 1) / kGroup) * static_cast<size_t>(num_tokens);
  const size_t value_floats = places * kGroup * input_bytes(format) / sizeof(float);
  float* memory = memory_.room(value_floats + 3 * places);
  Inputs inputs = {memory, memory + value_floats, nullptr, num_tokens};
  inputs.sums = reinterpret_cast<int32_t*>(inputs.steps + places);
  return inputs;
}

void ProductWorkspace::multiply(const ModelIsa& isa, const Matrix& matrix, Dtype dtype, const void* x, size_t x_stride,
                                int64_t num_tokens, Dtype out_dtype, void* out, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t work = static_cast<size_t>(matrix.panels()) * matrix.panel_bytes() * static_cast<size_t>(num_tokens);
  Threads team = threads;
  if (work < kSerialWork) team.count = 1;
  const Inputs inputs = inputs_.room(matrix.format, matrix.num_in, num_tokens);
  const auto row_floats = static_cast<size_t>(round_up(matrix.num_in, kGroup));
  const size_t thread_floats = kSumFloats + row_floats;
  float* memory = sums_.room(thread_floats * static_cast<size_t>(team.count));
  const size_t bytes = out_dtype == Dtype::kFloat32 ? 4 : 2;
  std::atomic<int64_t> next{0};
  parallel_team(team, [&](int rank, int size, Barrier& barrier) {
    float* sums = memory + thread_floats * static_cast<size_t>(rank);
    float* row = sums + kSumFloats;
    const Range mine = range_of(num_tokens, rank, size);
    for (int64_t token = mine.first; token < mine.last; ++token) {
      isa.widen(dtype, static_cast<const uint8_t*>(x) + static_cast<size_t>(token) * x_stride, matrix.num_in, row);
      isa.prepare(matrix.format, row, matrix.num_in, 0, token, inputs);
    }
    barrier.wait();
    multiply_share(isa, matrix, inputs, {rank, size, &next}, false, sums, [&](const Tile& tile, const float* found) {
      for (int part = 0; part < matrix.parts; ++part) {
        const int panel = part * matrix.part_panels() + tile.panel;
        const int count = std::min(tile.end_lane, matrix.num_rows(panel)) - tile.first_lane;
        if (count <= 0) continue;
        const float* from = found + static_cast<size_t>(part) * kMostBlockTokens * kLanes + tile.first_lane;
        const auto column = static_cast<size_t>(matrix.first_row(panel) + tile.first_lane);
        for (int64_t token = tile.first; token < tile.last; ++token, from += kLanes) {
          const size_t place = static_cast<size_t>(token) * static_cast<size_t>(matrix.num_out) + column;
          isa.narrow(out_dtype, from, count, static_cast<uint8_t*>(out) + place * bytes);
        }
      }
    });
  });
}

}  // namespace alisa
