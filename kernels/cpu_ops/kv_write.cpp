#include "vec.h"

namespace shoal {

// Sizes and strides in bytes: the elements are only moved.
SHOAL_EXPORT void shoal_kv_write(const char* k, const char* v, char* kv, const int64_t* slots, int64_t tokens, int kv_heads,
                               int64_t head_bytes, int block_size, int64_t k_stride, int64_t v_stride,
                               int64_t block_stride, int threads) {
  const int64_t head_stride = block_size * head_bytes;
#pragma omp parallel for num_threads(threads) if (tokens * kv_heads * head_bytes > 4 * kSerialElements)
  for (int64_t token = 0; token < tokens; ++token) {
    if (slots[token] < 0) continue;
    char* key = kv + slots[token] / block_size * block_stride + slots[token] % block_size * head_bytes;
    char* value = key + kv_heads * head_stride;
    for (int head = 0; head < kv_heads; ++head) {
      std::memcpy(key + head * head_stride, k + token * k_stride + head * head_bytes, head_bytes);
      std::memcpy(value + head * head_stride, v + token * v_stride + head * head_bytes, head_bytes);
    }
  }
}

}  // namespace shoal
