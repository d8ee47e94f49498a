// Products with 8-bit weights as Python calls them, shared out among threads.
#pragma once

#include <mutex>

#include "product.h"
#include "threads.h"
#include "workspace.h"

namespace alisa {

// Owns the inputs in 8 bits and the sums. One call at a time; a second caller waits.
class ProductWorkspace {
 public:
  // Fills the last block of fields of `task`, and then its output.
  void multiply(const ProductIsa& isa, ProductTask task, const Threads& threads);

 private:
  std::mutex mutex_;
  Buffer inputs_;
  Buffer sums_;
};

}  // namespace alisa
