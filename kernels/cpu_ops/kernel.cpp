#include <cstdint>

#include "kernel.h"

namespace shoal {

struct Call {
  void (*kernel)(const void*);
  const void* arguments;
};

SHOAL_EXPORT void shoal_run(const Call* calls, int64_t count, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].arguments);
}

SHOAL_EXPORT void shoal_run_one(void (*kernel)(const void*), const void* arguments, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  kernel(arguments);
}

}  // namespace shoal
