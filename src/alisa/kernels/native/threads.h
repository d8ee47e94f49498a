// Runs a function on several threads at once, on torch's own threads where there are any.
//
// A second OpenMP runtime would keep its own threads spinning beside torch's and oversubscribe the cores. So this library
// links none: Python finds the runtime that torch has loaded and hands over its entry point, and a parallel region of ours
// runs on the same pool as torch's operators.
#pragma once


namespace alisa {

// GOMP_parallel of libgomp and compatible runtimes: runs fn(data) once on every thread of a team.
using ParallelEntry = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

struct Threads {
  ParallelEntry entry;  // null: threads of our own, started for each call
  int count;
};

void run_on(const Threads& threads, void (*fn)(void*), void* data);

// body() on every thread; whoever comes first takes the next piece of work.
template <class Body>
void parallel(const Threads& threads, const Body& body) {
  run_on(threads, [](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body));
}

}  // namespace alisa
