// The order of elements inside one head of a block, agreed between kv_write.cpp and attention.cpp:
//
//   keys   [head_dim / pack][block_size][pack]   a query's word times a vector: scores of neighbouring keys
//   values [block_size / pack][head_dim][pack]   a weight's word times a vector: neighbouring outputs
//
// A word is what one lane of a product takes: two bfloat16, as the dot instructions do, or one element of any type.
#pragma once

#include "vec.h"

namespace shoal {

// Elements of a word.
template <class T>
SHOAL_INLINE int kv_pack(int head_dim, int block_size) {
  return std::is_same_v<T, BFloat16> && head_dim % 2 == 0 && block_size % 2 == 0 ? 2 : 1;
}

}  // namespace shoal
