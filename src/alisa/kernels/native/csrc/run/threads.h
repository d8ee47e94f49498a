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

// omp_get_num_threads and omp_get_thread_num of the same runtime.
using TeamQuestion = int (*)();

struct Threads {
  ParallelEntry entry;  // null: threads of our own, started for each call
  int count;
  TeamQuestion team_size;  // null where `entry` is
  TeamQuestion team_rank;
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

// How to wait for another thread: a turn spins, and after some microseconds of turns gives the processor away, again and again:
// with other programs about, the one that is waited for may need it.
class Patience {
 public:
  void wait();

 private:
  int turns_ = 0;
};

// Where the threads of a team wait for each other.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

// body(rank, size, barrier) on every thread of a team.
template <class Body>
void parallel_team(const Threads& threads, const Body& body) {
  if (threads.count <= 1) {
    Barrier barrier(1);
    body(0, 1, barrier);
    return;
  }
  // A runtime may give a region fewer threads than it was asked for: then one does it all.
  std::atomic<int> next{0};
  Barrier asked(threads.count);
  Barrier alone(1);
  parallel(threads, [&]() {
    if (threads.entry == nullptr) return body(next.fetch_add(1), threads.count, asked);
    const int size = threads.team_size();
    if (size == threads.count) return body(threads.team_rank(), size, asked);
    if (threads.team_rank() == 0) body(0, 1, alone);
  });
}

}  // namespace alisa
