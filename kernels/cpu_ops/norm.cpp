#include <cmath>

#include "vec.h"

namespace shoal {
namespace {

template <class T>
void normalise(T* out, const T* x, const float* weight, int dim, float eps) {
  Vec squares{};
  for_lanes(dim, [&](int i, int n) {
    const Vec v = load(x + i, n);
    squares += v * v;
  });
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / dim + eps);
  for_lanes(dim, [&](int i, int n) { store(out + i, load(x + i, n) * scale * load(weight + i, n), n); });
}

}  // namespace

SHOAL_EXPORT void shoal_rms_norm(void* out, const void* x, const float* weight, int64_t tokens, int64_t heads, int dim,
                               int64_t token_stride, int64_t head_stride, float eps, int dtype, int threads) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t rows = tokens * heads;
#pragma omp parallel for num_threads(threads) if (rows * dim > kSerialElements)
    for (int64_t row = 0; row < rows; ++row)
      normalise((T*)out + row * dim, (const T*)x + row / heads * token_stride + row % heads * head_stride, weight, dim,
                eps);
  });
}

SHOAL_EXPORT void shoal_add_rms_norm(void* out, const void* x, void* residual, const float* weight, int64_t tokens, int dim,
                                   int64_t x_stride, int64_t residual_stride, float eps, int dtype, int threads) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (tokens * dim > kSerialElements)
    for (int64_t token = 0; token < tokens; ++token) {
      T* sum = (T*)residual + token * residual_stride;
      const T* added = (const T*)x + token * x_stride;
      for_lanes(dim, [&](int i, int n) { store(sum + i, load(sum + i, n) + load(added + i, n), n); });
      normalise((T*)out + token * dim, (const T*)sum, weight, dim, eps);
    }
  });
}

}  // namespace shoal
