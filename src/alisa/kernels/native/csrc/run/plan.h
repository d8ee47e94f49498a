// Where the partial results of a call lie, and memory that is used again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "task.h"

namespace alisa {

// Work of less than this many bytes is done by one thread: waking another takes a few microseconds, in which one core reads
// some 40 KB.
constexpr size_t kSerialBytes = 1 << 16;

constexpr size_t kLineFloats = 64 / sizeof(float);

// Blocks of `size` that `length` makes.
inline int blocks_of(int length, int size) { return (length + size - 1) / size; }

inline size_t whole_lines(size_t floats) { return (floats + kLineFloats - 1) / kLineFloats * kLineFloats; }

// Memory that grows and is used again: its content is rewritten by every call.
class Buffer {
 public:
  // Room for `count` floats from the beginning of a cache line: a vector that straddles two is loaded twice.
  float* room(size_t count);

 private:
  std::vector<float> memory_;
};

// Where the blocks and the partial results of each sequence begin.
struct Plan {
  std::vector<size_t> first_block;
  std::vector<int> first_partial;

  // Lays out sequences of these lengths; returns how many blocks there are.
  size_t lay_out(const int32_t* lengths, int num_seqs, int block, int item_blocks);
  int num_partials() const { return first_partial.back(); }
  Grid grid() const { return {first_block.data(), first_partial.data()}; }
};

// The buffers of decode attention, one after the other in `memory`; the grid of the task is that of the plan.
void place(DecodeTask& task, const Plan& plan, Buffer& memory);
// Those of a sketch; with `room` further floats as the output of the task, where it has none.
void place(SketchTask& task, const Plan& plan, size_t room, Buffer& memory);

}  // namespace alisa
