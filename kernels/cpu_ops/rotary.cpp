#include "kernel.h"

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

struct Rotary {
  void *q, *k;
  const int64_t* positions;
  const float* cos_sin;
  int64_t tokens;
  int heads, kv_heads, head_dim, rotary_dim;
  int64_t q_stride, k_stride;
  int dtype;
};

SHOAL_KERNEL(rotary, Rotary) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int half = a.rotary_dim / 2;
    deal_rows(a.tokens, [&](int64_t token) {
      const float* cos = a.cos_sin + a.positions[token] * a.rotary_dim;
      rotate((T*)a.q + token * a.q_stride, a.heads, a.head_dim, cos, cos + half, half);
      rotate((T*)a.k + token * a.k_stride, a.kv_heads, a.head_dim, cos, cos + half, half);
    });
  });
}

}  // namespace shoal
