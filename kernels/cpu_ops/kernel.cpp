#include "kernel.h"

#include <omp.h>

#include <cstdlib>
#include <vector>

namespace shoal {

thread_local Team team;

void meet() {
#pragma omp barrier
}

struct Call {
  void (*kernel)(const void*);
  const void* arguments;
};

SHOAL_EXPORT void shoal_run(const Call* calls, int64_t count, int threads) {
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].arguments);
    return;
  }
  static thread_local std::vector<Taken> memory;
  const int64_t loops = count * kMaxLoops;
  if ((int64_t)memory.size() < threads * loops) memory = std::vector<Taken>(threads * loops);
  Taken* taken = memory.data();
#pragma omp parallel num_threads(threads)
  {
    const int self = omp_get_thread_num();
    team = {self, omp_get_num_threads(), taken, loops, 0};
    for (int64_t i = 0; i < loops; ++i) taken[self * loops + i].store(0, std::memory_order_relaxed);
    meet();
    for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].arguments);
    if (team.loop > loops) std::abort();  // a kernel deals out more than kMaxLoops
    team = {};
  }
}

SHOAL_EXPORT void shoal_run_one(void (*kernel)(const void*), const void* arguments, int threads) {
  const Call call{kernel, arguments};
  shoal_run(&call, 1, threads);
}

}  // namespace shoal
