// Division of work among XLA's threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jmemserve {

// Run work(0) .. work(count - 1) on the caller and on XLA's threads. A thread that comes too late finds nothing to
// do, so the caller never waits for threads that are busy elsewhere, only for work that has begun.
template <class Work>
void parallel(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count;
    const Work* work;
    std::mutex mutex;
    std::condition_variable all_done;
    void run() {
      int64_t here = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; here++) (*work)(i);
      if (here && done.fetch_add(here) + here == count) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_all();
      }
    }
  };
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  auto state = std::make_shared<State>();
  state->count = count;
  state->work = &work;
  int64_t others = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < others; i++) pool.Schedule([state] { state->run(); });
  state->run();
  // What is left is at most one piece of work of each other thread, sooner done than a sleeping thread wakes up.
  auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  while (std::chrono::steady_clock::now() < until)
    if (state->done.load() == count) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace jmemserve
