// See threads.h.
#include "threads.h"

#include <thread>
#include <vector>

#ifdef ALISA_X86
#include <immintrin.h>
#endif

namespace alisa {
namespace {

// 10 to 40 microseconds, as long as a processor makes a pause: about what it takes to wake a thread that sleeps.
constexpr int kSpins = 1000;

inline void pause() {
#ifdef ALISA_X86
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

void Patience::wait() {
  if (turns_ < kSpins) {
    ++turns_;
    pause();
  } else {
    std::this_thread::yield();
  }
}

void Barrier::wait() {
  const uint32_t round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (Patience patience; round_.load(std::memory_order_acquire) == round;) patience.wait();
}

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
