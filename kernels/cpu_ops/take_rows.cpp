#include "kernel.h"

namespace shoal {

struct TakeRows {
  void* out;
  const int64_t* rows;
  const void* x;
  int64_t count, dim, stride;
  float scale;
  int dtype;
};

SHOAL_KERNEL(take_rows, TakeRows) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    deal_rows(a.count, [&](int64_t i) {
      T* to = (T*)a.out + i * a.dim;
      const T* from = (const T*)a.x + a.rows[i] * a.stride;
      for_lanes(a.dim, [&](int lane, int n) { store(to + lane, load(from + lane, n) * a.scale, n); });
    });
  });
}

}  // namespace shoal
