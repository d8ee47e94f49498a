// Products with the weights of a linear layer as Python calls them, shared out among threads.
#pragma once

#include <mutex>

#include "model_isa.h"
#include "threads.h"
#include "workspace.h"

namespace alisa {

// Memory of inputs and sums: the inputs of `tokens` tokens in the form that weights of this format ask for.
class InputBuffer {
 public:
  Inputs room(WeightFormat format, int num_in, int64_t num_tokens);

 private:
  Buffer memory_;
};

// The part of a product that is due to one thread of a team: write(tile, sums) takes `sums` [tokens, kLanes] with scale and
// bias. Up to a block of tokens threads share out the lanes, always in the same way, so that weights stay in the caches of
// one core; beyond, whole tiles, first come first served by `next`, which begins at 0. `whole_panels` are never taken apart.
struct Share {
  int rank;
  int size;
  std::atomic<int64_t>* next;
};

template <class Write>
void multiply_share(const ModelIsa& isa, const Matrix& matrix, const Inputs& inputs, const Share& share,
                    bool whole_panels, float* sums, const Write& write) {
  const Multiply multiply = isa.multiply[static_cast<int>(matrix.format)];
  const int block = block_tokens(matrix.format);
  const int64_t tokens = inputs.num_tokens;
  // The parts of a matrix go together: what belongs to the same place of each is one thread's.
  const int panels = matrix.part_panels();
  const auto run = [&](int panel, int first_lane, int end_lane, int64_t first, int64_t last) {
    for (int part = 0; part < matrix.parts; ++part) {
      const Tile tile = {part * panels + panel, first_lane, end_lane, first, last};
      multiply(matrix, inputs, tile, sums + static_cast<size_t>(part) * kMostBlockTokens * kLanes);
    }
    write(Tile{panel, first_lane, end_lane, first, last}, sums);
  };
  if (tokens <= block) {
    const int per_panel = whole_panels ? 1 : kLanes / kLaneUnit;
    const int lanes = kLanes / per_panel;
    const int64_t units = static_cast<int64_t>(panels) * per_panel;
    int64_t unit = units * share.rank / share.size;
    const int64_t end = units * (share.rank + 1) / share.size;
    while (unit < end) {
      const int64_t panel = unit / per_panel;
      const int64_t stop = std::min(end, (panel + 1) * per_panel);
      run(static_cast<int>(panel), static_cast<int>(unit - panel * per_panel) * lanes,
          static_cast<int>(stop - panel * per_panel) * lanes, 0, tokens);
      unit = stop;
    }
    return;
  }
  // The blocks of one panel follow each other: its weights stay in L2 meanwhile.
  const int64_t blocks = (tokens + block - 1) / block;
  for (int64_t item = share.next->fetch_add(1); item < panels * blocks; item = share.next->fetch_add(1)) {
    const int64_t at = item % blocks;
    run(static_cast<int>(item / blocks), 0, kLanes, tokens * at / blocks, tokens * (at + 1) / blocks);
  }
}

constexpr size_t kSumFloats = static_cast<size_t>(2) * kMostBlockTokens * kLanes;

// Tokens of a call that one thread makes ready.
struct Range {
  int64_t first;
  int64_t last;
};
inline Range range_of(int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

// One product. One call at a time; a second caller waits.
class ProductWorkspace {
 public:
  // x `[M, num_in]` in `dtype` with `x_stride` bytes from one token to the next, out `[M, num_out]` in `out_dtype`.
  void multiply(const ModelIsa& isa, const Matrix& matrix, Dtype dtype, const void* x, size_t x_stride, int64_t num_tokens,
                Dtype out_dtype, void* out, const Threads& threads);

 private:
  std::mutex mutex_;
  InputBuffer inputs_;
  Buffer sums_;
};

}  // namespace alisa
