// Decode attention as one call: cut into items, attended by all threads, merged.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace alisa {

// Memory that is used again by the next call: megabytes freshly allocated for every layer would cost more in page faults
// than the arithmetic on them. One call at a time; a second caller waits.
class Workspace {
 public:
  // Fills the plan of `task` (its last block of fields) and runs it.
  void decode(const Isa& isa, DecodeTask task, const Threads& threads);
  void encode(const Isa& isa, const EncodeTask& task, int64_t num_tokens, const Threads& threads);

 private:
  void plan(DecodeTask& task, int num_threads);
  float* scratch(size_t floats_per_thread, int num_threads);

  std::mutex mutex_;
  std::vector<Item> items_;
  std::vector<int> first_item_;
  std::unique_ptr<std::atomic<int>[]> open_items_;
  size_t open_items_capacity_ = 0;
  std::vector<float> floats_;
  std::vector<float> scratch_;
};

}  // namespace alisa
