// Runs a function on several threads at once, on torch's own threads where there are any.
//
// A second OpenMP runtime would keep its own threads spinning next to torch's and oversubscribe the cores. So this library
// links none: Python finds the runtime that torch has loaded and hands over its entry point, and a parallel region of ours
// runs on the same pool as torch's operators.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace alisa {

// GOMP_parallel of libgomp and compatible runtimes: runs fn(data) once on every thread of a team.
using ParallelEntry = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

struct Threads {
  ParallelEntry entry;  // null: threads of our own, started for each call
  int count;
};

void run_on(const Threads& threads, void (*fn)(void*), void* data);

// body() on every thread.
template <class Body>
void parallel(const Threads& threads, const Body& body) {
  run_on(threads, [](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body));
}

// Runs of `step` of [0, count): whoever comes first takes the next one. start(thread) makes what a thread does with
// (first, last); threads are numbered as they come.
template <class Start>
void share_out(const Threads& threads, int64_t count, int64_t step, const Start& start) {
  std::atomic<int64_t> next{0};
  std::atomic<int> next_thread{0};
  parallel(threads, [&]() {
    auto body = start(next_thread.fetch_add(1));
    for (int64_t first = next.fetch_add(step); first < count; first = next.fetch_add(step)) {
      body(first, std::min(first + step, count));
    }
  });
}

}  // namespace alisa
