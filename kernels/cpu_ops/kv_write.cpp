#include "kv_layout.h"

namespace shoal {
namespace {

template <class T, int kPack>
void write(const T* k, const T* v, T* kv, const int64_t* slots, int64_t tokens, int kv_heads, int dim, int block_size,
           int64_t k_stride, int64_t v_stride, int64_t block_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * kv_heads * dim > kSerialElements)
  for (int64_t token = 0; token < tokens; ++token) {
    if (slots[token] < 0) continue;
    const int64_t offset = slots[token] % block_size;
    T* keys = kv + slots[token] / block_size * block_stride;
    for (int head = 0; head < kv_heads; ++head, keys += (int64_t)block_size * dim) {
      T* values = keys + (int64_t)kv_heads * block_size * dim;
      const T *key = k + token * k_stride + head * dim, *value = v + token * v_stride + head * dim;
      for (int64_t i = 0; i < dim; i += kPack)
        std::memcpy(keys + i * block_size + offset * kPack, key + i, kPack * sizeof(T));
      T* to = values + offset / kPack * kPack * dim + offset % kPack;
      for (int64_t i = 0; i < dim; ++i) to[i * kPack] = value[i];
    }
  }
}

}  // namespace

// Strides in elements.
SHOAL_EXPORT void shoal_kv_write(const void* k, const void* v, void* kv, const int64_t* slots, int64_t tokens,
                                 int kv_heads, int dim, int block_size, int64_t k_stride, int64_t v_stride,
                                 int64_t block_stride, int dtype, int threads) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = kv_pack<T>(dim, block_size) == 2 ? write<T, 2> : write<T, 1>;
    run((const T*)k, (const T*)v, (T*)kv, slots, tokens, kv_heads, dim, block_size, k_stride, v_stride, block_stride,
        threads);
  });
}

}  // namespace shoal
