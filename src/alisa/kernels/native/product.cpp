// See product_workspace.h, and product.h for the choice of the instruction set.
#include "product_workspace.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace alisa {
namespace {

// Inputs below this many are rounded by the calling thread alone, and products below this many bytes of weights times
// tokens are made by it: waking another takes a few microseconds.
constexpr int64_t kSerialInputs = 1 << 14;
constexpr size_t kSerialWork = 1 << 17;

// Pieces of work for each thread, as in workspace.cpp.
constexpr int64_t kItemsPerThread = 8;

constexpr size_t kSumFloats = static_cast<size_t>(kBlockTokens) * kLanes;

// body(first, last) for runs of [0, count).
template <class Body>
void in_runs(const Threads& threads, int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<int> next_thread{0};
  const int64_t step = std::max<int64_t>(1, count / (kItemsPerThread * threads.count));
  parallel(threads, [&]() {
    const int thread = next_thread.fetch_add(1);
    for (int64_t first = next.fetch_add(step); first < count; first = next.fetch_add(step)) {
      body(thread, first, std::min(first + step, count));
    }
  });
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
  const auto places = static_cast<size_t>(task.groups()) * static_cast<size_t>(task.num_tokens);
  const size_t code_floats = places * kGroup / sizeof(float);
  float* inputs = inputs_.room(code_floats + 2 * places);
  task.x_codes = reinterpret_cast<int8_t*>(inputs);
  task.steps = inputs + code_floats;
  task.starts = reinterpret_cast<int32_t*>(task.steps + places);
  float* sums = sums_.room(kSumFloats * static_cast<size_t>(threads.count));

  const Threads alone = {threads.entry, 1};
  const bool few_inputs = task.num_tokens * task.num_in < kSerialInputs;
  in_runs(few_inputs ? alone : threads, task.num_tokens,
          [&](int, int64_t first, int64_t last) { isa.quantise(task, first, last); });

  // The blocks of one panel follow each other: its weights stay in L2 meanwhile.
  const int64_t blocks = (task.num_tokens + kBlockTokens - 1) / kBlockTokens;
  const size_t work = static_cast<size_t>(task.panels()) * task.panel_bytes() * static_cast<size_t>(task.num_tokens);
  in_runs(work < kSerialWork ? alone : threads, task.panels() * blocks, [&](int thread, int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item % blocks;
      isa.multiply(task, static_cast<int>(item / blocks), task.num_tokens * block / blocks,
                   task.num_tokens * (block + 1) / blocks, sums + kSumFloats * static_cast<size_t>(thread));
    }
  });
}

}  // namespace alisa
