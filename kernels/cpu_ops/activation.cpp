#include "vec.h"

namespace shoal {
namespace {

SHOAL_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

SHOAL_INLINE Vec gelu_tanh(Vec x) {
  const float root = 0.7978845608f;  // sqrt(2 / pi)
  return 0.5f * x * (1.0f + tanh(root * (x + 0.044715f * x * x * x)));
}

}  // namespace

SHOAL_EXPORT void shoal_gated_activation(void* out, const void* gate_up, int64_t tokens, int inter, int64_t stride,
                                       int is_gelu, int dtype, int threads) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(threads) if (tokens * inter > kSerialElements)
    for (int64_t token = 0; token < tokens; ++token) {
      const T* gate = (const T*)gate_up + token * stride;
      T* row = (T*)out + token * inter;
      if (is_gelu)
        for_lanes(inter, [&](int i, int n) { store(row + i, gelu_tanh(load(gate + i, n)) * load(gate + inter + i, n), n); });
      else
        for_lanes(inter, [&](int i, int n) { store(row + i, silu(load(gate + i, n)) * load(gate + inter + i, n), n); });
    }
  });
}

}  // namespace shoal
