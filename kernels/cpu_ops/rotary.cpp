#include "vec.h"

namespace shoal {
namespace {

template <class T>
void rotate(T* token, int heads, int head_dim, const float* cos, const float* sin, int half) {
  for (int head = 0; head < heads; ++head) {
    T* first = token + (int64_t)head * head_dim;
    T* second = first + half;
    for_lanes(half, [&](int i, int n) {
      const Vec a = load(first + i, n), b = load(second + i, n), c = load(cos + i, n), s = load(sin + i, n);
      store(first + i, a * c - b * s, n);
      store(second + i, b * c + a * s, n);
    });
  }
}

}  // namespace

SHOAL_EXPORT void shoal_rotary(void* q, void* k, const int64_t* positions, const float* cos_sin, int64_t tokens, int heads,
                             int kv_heads, int head_dim, int rotary_dim, int64_t q_stride, int64_t k_stride, int dtype,
                             int threads) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int half = rotary_dim / 2;
#pragma omp parallel for num_threads(threads) if (tokens * (heads + kv_heads) * head_dim > kSerialElements)
    for (int64_t token = 0; token < tokens; ++token) {
      const float* cos = cos_sin + positions[token] * rotary_dim;
      rotate((T*)q + token * q_stride, heads, head_dim, cos, cos + half, half);
      rotate((T*)k + token * k_stride, kv_heads, head_dim, cos, cos + half, half);
    }
  });
}

}  // namespace shoal
