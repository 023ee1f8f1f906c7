#include "kernel.h"
#include "kv_layout.h"

namespace shoal {

struct KVWrite {
  const void *k, *v;
  void* kv;
  const int64_t* slots;
  int64_t tokens;
  int kv_heads, dim, block_size;
  int64_t k_stride, v_stride, block_stride;  // in elements
  int dtype;
};

namespace {

// A token's key lies in as many cache lines as it has words: they are fetched while the token before is written.
template <class T, int kPack>
void fetch(const KVWrite& a, int64_t slot) {
  const T* keys = (const T*)a.kv + slot / a.block_size * a.block_stride + slot % a.block_size * kPack;
  const int64_t words = (int64_t)a.kv_heads * a.dim / kPack;
  for (int64_t word = 0; word < words; ++word) __builtin_prefetch(keys + word * a.block_size * kPack, 1);
}

template <class T, int kPack>
void write(const KVWrite& a) {
  deal_rows(a.tokens, [&](int64_t token) {
    const int64_t slot = a.slots[token], offset = slot % a.block_size;
    if (token + 1 < a.tokens && a.slots[token + 1] >= 0 && a.slots[token + 1] / a.block_size != slot / a.block_size)
      fetch<T, kPack>(a, a.slots[token + 1]);
    if (slot < 0) return;
    T* keys = (T*)a.kv + slot / a.block_size * a.block_stride;
    for (int head = 0; head < a.kv_heads; ++head, keys += (int64_t)a.block_size * a.dim) {
      T* values = keys + (int64_t)a.kv_heads * a.block_size * a.dim;
      const T* key = (const T*)a.k + token * a.k_stride + head * a.dim;
      const T* value = (const T*)a.v + token * a.v_stride + head * a.dim;
      for (int64_t i = 0; i < a.dim; i += kPack)
        std::memcpy(keys + i * a.block_size + offset * kPack, key + i, kPack * sizeof(T));
      T* to = values + offset / kPack * kPack * a.dim + offset % kPack;
      for (int64_t i = 0; i < a.dim; ++i) to[i * kPack] = value[i];
    }
  });
}

}  // namespace

SHOAL_KERNEL(kv_write, KVWrite) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    kv_pack<T>(a.dim, a.block_size) == 2 ? write<T, 2>(a) : write<T, 1>(a);
  });
}

}  // namespace shoal
