// The end of one sequence: partial results merged exactly by maximum and sum, and the kept weights turned into mass.
#pragma once

#include "elements.h"
#include "exponential.h"
#include "task.h"

namespace alisa::ALISA_ISA {

// What one thread needs while it finishes a sequence.
struct FinishScratch {
  float* maximum;  // [H]
  float* inverse;  // [H]: 1 / sum
  float* factor;   // [H]
  float* head;     // [values().head_stride()]

  static size_t floats(const RowLayout& layout, int num_heads) {
    return 3 * static_cast<size_t>(num_heads) + static_cast<size_t>(layout.values().head_stride());
  }
  FinishScratch(int num_heads, float* memory)
      : maximum(memory), inverse(maximum + num_heads), factor(inverse + num_heads), head(factor + num_heads) {}
};

inline void merge_head(const DecodeTask& task, int seq, int h, const FinishScratch& scratch) {
  const HalfLayout layout = task.layout.values();
  const int stride = layout.head_stride();
  const int part = layout.part_stride();
  const int first = task.grid.first_partial[seq];
  const int last = task.grid.first_partial[seq + 1];
  const auto at = [&](const float* values, int index) { return values[static_cast<size_t>(index) * task.num_heads + h]; };
  float maximum = at(task.partial_max, first);
  for (int index = first + 1; index < last; ++index) {
    const float other = at(task.partial_max, index);
    maximum = other > maximum ? other : maximum;
  }
  float total = 0.0F;
  for (int i = 0; i < stride; i += kWidth) store(scratch.head + i, set1(0.0F));
  for (int index = first; index < last; ++index) {
    const float weight = exp_nonpositive(at(task.partial_max, index) - maximum);
    const float* partial = task.partial_out + (static_cast<size_t>(index) * task.num_heads + h) * stride;
    const float* shift = task.partial_shift + (static_cast<size_t>(index) * task.num_heads + h) * layout.parts;
    total += weight * at(task.partial_sum, index);
    for (int p = 0; p < layout.parts; ++p) {
      for (int i = p * part; i < (p + 1) * part; i += kWidth) {
        store(scratch.head + i, fma(set1(weight), load(partial + i) + set1(shift[p]), load(scratch.head + i)));
      }
    }
  }
  const float inverse = 1.0F / total;
  for (int i = 0; i < stride; i += kWidth) store(scratch.head + i, load(scratch.head + i) * set1(inverse));
  if (layout.planes() > 1 && layout.parts == 1) {  // the planes of several parts are not padded
    const int plane = layout.plane_len();
    __builtin_memmove(scratch.head + plane, scratch.head + layout.plane_stride(),
                      static_cast<size_t>(layout.head_dim - plane) * sizeof(float));
  }
  const size_t index = static_cast<size_t>(seq) * task.num_heads + h;
  const size_t head_bytes = static_cast<size_t>(layout.head_dim) * value_bytes(task.q_dtype);
  narrow(task.q_dtype, scratch.head, layout.head_dim, static_cast<uint8_t*>(task.out) + index * head_bytes);
  task.log_sum_exp[index] = maximum + __builtin_logf(total);
  scratch.maximum[h] = maximum;
  scratch.inverse[h] = inverse;
}

inline void finish(const DecodeTask& task, int seq, float* memory) {
  const int num_heads = task.num_heads;
  const FinishScratch scratch(num_heads, memory);
  for (int h = 0; h < num_heads; ++h) merge_head(task, seq, h, scratch);
  if (task.mass == nullptr) return;

  const int heads_per_set = num_heads / task.num_sets;
  float* mass = task.mass + static_cast<size_t>(seq) * task.num_sets * task.num_slots;
  size_t number = task.grid.first_block[seq];
  const int count = task.counts[seq];
  for (int first = 0; first < count; first += kBlock, ++number) {
    const float* weights = task.weights + number * num_heads * kBlock;
    const float* block_max = task.block_max + number * num_heads;
    for (int h = 0; h < num_heads; ++h) {
      scratch.factor[h] = exp_nonpositive(block_max[h] - scratch.maximum[h]) * scratch.inverse[h];
    }
    const int left = count - first < kBlock ? count - first : kBlock;
    for (int set = 0; set < task.num_sets; ++set) {
      float sums[kBlock];
      for (int i = 0; i < kBlock; i += kWidth) {
        F sum = set1(0.0F);
        for (int h = set * heads_per_set; h < (set + 1) * heads_per_set; ++h) {
          sum = fma(set1(scratch.factor[h]), load(weights + h * kBlock + i), sum);
        }
        store(sums + i, sum);
      }
      std::memcpy(mass + static_cast<size_t>(set) * task.num_slots + first, sums, static_cast<size_t>(left) * sizeof(float));
    }
  }
  for (int set = 0; set < task.num_sets; ++set) {
    float* of_set = mass + static_cast<size_t>(set) * task.num_slots;
    for (int i = count; i < task.num_slots; ++i) of_set[i] = 0.0F;
  }
}

}  // namespace alisa::ALISA_ISA
