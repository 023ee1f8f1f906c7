#include "activation.h"
#include "kernel.h"

namespace shoal {
struct GatedActivation {
  void* out;
  const void* gate_up;
  int64_t tokens;
  int inter;
  int64_t stride;
  int is_gelu, dtype;
};

SHOAL_KERNEL(gated_activation, GatedActivation) {
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    deal_rows(a.tokens, [&](int64_t token) {
      const T *gate = (const T*)a.gate_up + token * a.stride, *up = gate + a.inter;
      T* row = (T*)a.out + token * a.inter;
      if (a.is_gelu)
        for_lanes(a.inter, [&](int i, int n) { store(row + i, gelu_tanh(load(gate + i, n)) * load(up + i, n), n); });
      else
        for_lanes(a.inter, [&](int i, int n) { store(row + i, silu(load(gate + i, n)) * load(up + i, n), n); });
    });
  });
}

}  // namespace shoal
