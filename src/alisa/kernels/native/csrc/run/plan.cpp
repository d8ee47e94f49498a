// See plan.h.
#include "plan.h"

namespace alisa {

float* Buffer::room(size_t count) {
  if (memory_.size() < count + kLineFloats) {
    memory_.clear();
    memory_.resize(count + kLineFloats);
  }
  const auto address = reinterpret_cast<uintptr_t>(memory_.data());
  return memory_.data() + (64 - address % 64) % 64 / sizeof(float);
}

size_t Plan::lay_out(const int32_t* lengths, int num_seqs, int block, int item_blocks) {
  first_block.assign(1, 0);
  first_partial.assign(1, 0);
  for (int seq = 0; seq < num_seqs; ++seq) {
    const int blocks = blocks_of(lengths[seq], block);
    first_block.push_back(first_block.back() + static_cast<size_t>(blocks));
    first_partial.push_back(first_partial.back() + blocks_of(blocks, item_blocks));
  }
  return first_block.back();
}

void place(DecodeTask& task, const Plan& plan, Buffer& memory) {
  const auto heads = static_cast<size_t>(task.num_heads);
  const size_t num_blocks = plan.first_block.back();
  const size_t weights = num_blocks * heads * kBlock;
  const size_t partials = static_cast<size_t>(plan.num_partials()) * heads;
  const size_t outs = partials * static_cast<size_t>(task.layout.values().head_stride());
  const size_t shifts = partials * static_cast<size_t>(task.layout.parts);
  task.grid = plan.grid();
  task.weights = memory.room(weights + outs + num_blocks * heads + 2 * partials + shifts);
  task.partial_out = task.weights + weights;
  task.block_max = task.partial_out + outs;
  task.partial_max = task.block_max + num_blocks * heads;
  task.partial_sum = task.partial_max + partials;
  task.partial_shift = task.partial_sum + partials;
}

void place(SketchTask& task, const Plan& plan, size_t room, Buffer& memory) {
  const auto heads = static_cast<size_t>(task.heads());
  const size_t num_blocks = plan.first_block.back();
  const size_t weights = num_blocks * task.block_floats();
  const size_t partials = static_cast<size_t>(plan.num_partials()) * heads;
  // Heads of `partial_values` are as long as their padding, those of the others are padded together.
  const size_t shifts = task.completes() ? partials : 0;
  const size_t values = task.completes() ? static_cast<size_t>(plan.num_partials()) * task.num_heads *
                                               static_cast<size_t>(task.value_layout.head_stride())
                                         : 0;
  task.grid = plan.grid();
  task.weights = memory.room(weights + 3 * partials + shifts + values + room);
  task.partial_max = task.weights + weights;
  task.partial_sum = task.partial_max + partials;
  task.partial_factor = task.partial_sum + partials;
  task.partial_shift = task.partial_factor + partials;
  task.partial_values = task.partial_shift + shifts;
  if (room > 0) task.out = task.partial_values + values;
}

}  // namespace alisa
