// See product_workspace.h, and product.h for the choice of the instruction set.
#include "product_workspace.h"

#include <algorithm>
#include <cstring>

namespace alisa {
namespace {

// Products below this many bytes of weights times tokens are made by the calling thread alone: waking another takes a few
// microseconds.
constexpr size_t kSerialWork = 1 << 17;

// Up to this many inputs, counted once for each thread, every thread rounds all of them for itself: what another has written
// costs more to fetch from its cache, and to wait for.
constexpr int64_t kOwnInputs = 1 << 19;

// Pieces of work for each thread, as in workspace.cpp.
constexpr int64_t kItemsPerThread = 8;

constexpr size_t kSumFloats = static_cast<size_t>(kBlockTokens) * kLanes;

int64_t step_of(const Threads& threads, int64_t count) {
  return std::max<int64_t>(1, count / (kItemsPerThread * threads.count));
}

}  // namespace

const ProductIsa* find_product_isa(const char* name) {
#ifdef ALISA_X86
  __builtin_cpu_init();
  if (std::strcmp(name, kProductVnni.name) == 0) {
    return find_isa("avx512_vnni") != nullptr ? &kProductVnni : nullptr;
  }
  if (std::strcmp(name, kProductAvx2.name) == 0) return find_isa("avx2") != nullptr ? &kProductAvx2 : nullptr;
#endif
  return std::strcmp(name, kProductPortable.name) == 0 ? &kProductPortable : nullptr;
}

void ProductWorkspace::multiply(const ProductIsa& isa, ProductTask task, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t work = static_cast<size_t>(task.panels()) * task.panel_bytes() * static_cast<size_t>(task.num_tokens);
  const Threads team = {threads.entry, work < kSerialWork ? 1 : threads.count};
  const bool own_inputs = task.num_tokens * task.num_in * team.count <= kOwnInputs;

  const auto places = static_cast<size_t>(task.groups()) * static_cast<size_t>(task.num_tokens);
  const size_t code_floats = places * kGroup / sizeof(float);
  const size_t floats = code_floats + 2 * static_cast<size_t>(round_up(static_cast<int>(places), kPad));
  float* inputs = inputs_.room(floats * static_cast<size_t>(own_inputs ? team.count : 1));
  const auto inputs_in = [&](float* place) {
    ProductTask mine = task;
    mine.x_codes = reinterpret_cast<int8_t*>(place);
    mine.steps = place + code_floats;
    mine.starts = reinterpret_cast<int32_t*>(mine.steps + places);
    return mine;
  };
  if (!own_inputs) {
    share_out(team, task.num_tokens, step_of(team, task.num_tokens), [&](int) {
      return [&, shared = inputs_in(inputs)](int64_t first, int64_t last) { isa.quantise(shared, first, last); };
    });
  }

  float* sums = sums_.room(kSumFloats * static_cast<size_t>(team.count));
  // The blocks of one panel follow each other: its weights stay in L2 meanwhile.
  const int64_t blocks = (task.num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t items = task.panels() * blocks;
  share_out(team, items, step_of(team, items), [&](int thread) {
    const auto number = static_cast<size_t>(thread);
    const ProductTask mine = inputs_in(own_inputs ? inputs + floats * number : inputs);
    if (own_inputs) isa.quantise(mine, 0, mine.num_tokens);
    return [&isa, mine, blocks, my_sums = sums + kSumFloats * number](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks;
        isa.multiply(mine, static_cast<int>(item / blocks), mine.num_tokens * block / blocks,
                     mine.num_tokens * (block + 1) / blocks, my_sums);
      }
    };
  });
}

}  // namespace alisa
