// See threads.h.
#include "threads.h"

#include <thread>
#include <vector>

namespace alisa {

void run_on(const Threads& threads, void (*fn)(void*), void* data) {
  if (threads.count <= 1) {
    fn(data);
  } else if (threads.entry != nullptr) {
    threads.entry(fn, data, static_cast<unsigned>(threads.count), 0);
  } else {
    // Some 20 microseconds each: this is for platforms where torch brings no OpenMP runtime that we know.
    std::vector<std::thread> others;
    for (int i = 1; i < threads.count; ++i) others.emplace_back(fn, data);
    fn(data);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace alisa
