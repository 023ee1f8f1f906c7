#include "kernel.h"

namespace shoal {

struct Embedding {
  void* out;
  const int64_t* ids;
  const void* table;
  int64_t tokens, dim;
  float scale;
  int dtype;
};

SHOAL_KERNEL(embedding, Embedding) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a.tokens; ++token) {
      T* row = (T*)a.out + token * a.dim;
      const T* from = (const T*)a.table + a.ids[token] * a.dim;
      for_lanes(a.dim, [&](int i, int n) { store(row + i, load(from + i, n) * a.scale, n); });
    }
  });
}

}  // namespace shoal
