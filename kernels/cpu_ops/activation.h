#pragma once

#include "vec.h"

namespace shoal {

SHOAL_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

SHOAL_INLINE Vec gelu_tanh(Vec x) {
  const float root = 0.7978845608f;  // sqrt(2 / pi)
  return 0.5f * x * (1.0f + tanh(root * (x + 0.044715f * x * x * x)));
}

}  // namespace shoal
