#include <cmath>

#include "kernel.h"

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

template <class T>
void add(T* sum, const T* x, int64_t dim) {
  for_lanes(dim, [&](int i, int n) { store(sum + i, load(sum + i, n) + load(x + i, n), n); });
}

}  // namespace

struct RmsNorm {
  void* out;
  const void* x;
  const float* weight;
  int64_t tokens, heads;
  int dim;
  int64_t token_stride, head_stride;
  float eps;
  int dtype;
};

SHOAL_KERNEL(rms_norm, RmsNorm) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t rows = a.tokens * a.heads;
    deal_rows(rows, [&](int64_t row) {
      normalise((T*)a.out + row * a.dim, (const T*)a.x + row / a.heads * a.token_stride + row % a.heads * a.head_stride,
                a.weight, a.dim, a.eps);
    });
  });
}

struct AddRmsNorm {
  void* out;
  const void* x;
  void* residual;
  const float* weight;
  int64_t tokens;
  int dim;
  int64_t x_stride, residual_stride;
  float eps;
  int dtype;
};

SHOAL_KERNEL(add_rms_norm, AddRmsNorm) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    deal_rows(a.tokens, [&](int64_t token) {
      T* sum = (T*)a.residual + token * a.residual_stride;
      add(sum, (const T*)a.x + token * a.x_stride, a.dim);
      normalise((T*)a.out + token * a.dim, (const T*)sum, a.weight, a.dim, a.eps);
    });
  });
}

struct Add {
  void* sum;
  const void* x;
  int64_t tokens, dim, stride, x_stride;
  int dtype;
};

SHOAL_KERNEL(add, Add) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    deal_rows(a.tokens, [&](int64_t token) {
      add((T*)a.sum + token * a.stride, (const T*)a.x + token * a.x_stride, a.dim);
    });
  });
}

}  // namespace shoal
