// Matrix products with weights of 4 or 8 bits, as GGUF's types Q4_0, Q4_1 and Q8_0 store them: 32 inputs of an output
// share a float16 scale, and in Q4_1 a minimum. Inputs are rounded to 8 bits, 32 of a row sharing a scale, so that a
// block's products are integers, which add up exactly; blocks add up in float32, in order, whatever the number of rows
// and threads: a row's result does not depend on its batch.
//
// The weight lies in panels of 32 outputs. A panel holds, for every block of inputs: 32 scales, in Q4_1 32 minima, and
// words of four bytes, one output beside the other. A byte is one weight, or two: input i in its lower and i + 16 in
// its upper half. Weights are unsigned, the block's offset taken off once for all 32.
#include <vector>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernel.h"

namespace shoal {
namespace {

constexpr int kBlock = 32;  // inputs
constexpr int kPanel = 32;  // outputs

// Vectors as wide as registers: compilers keep wider ones in memory, which costs integer products more than others.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kMaxRows = 6;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kMaxRows = 1;  // 8 of 16
#else
constexpr int kWidth = 4;
constexpr int kMaxRows = 1;
#endif
constexpr int kVectors = kPanel / kWidth;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Sums __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Quads __attribute__((vector_size(4 * kWidth)));  // of bytes

constexpr int64_t kRowsPerTask = 64;

struct Q8_0 {
  static constexpr int kBits = 8, kOffset = 128;
  static constexpr bool kHasMinima = false;
};
struct Q4_0 {
  static constexpr int kBits = 4, kOffset = 8;
  static constexpr bool kHasMinima = false;
};
struct Q4_1 {
  static constexpr int kBits = 4, kOffset = 0;
  static constexpr bool kHasMinima = true;
};

// Calls body with the format that a code of quantized_linear.py stands for.
template <class Body>
void with_format(int format, Body body) {
  if (format == 0) body(Q8_0{});
  if (format == 1) body(Q4_0{});
  if (format == 2) body(Q4_1{});
}

// 32 inputs of 32 outputs.
template <class Format>
struct PanelBlock {
  Float16 scales[kPanel];
  Float16 minima[Format::kHasMinima ? kPanel : 0];
  uint32_t words[kBlock / 4 * Format::kBits / 8][kPanel];
};

// 32 inputs of a row.
struct InputBlock {
  float scale;
  float sum;      // of scale * values
  int32_t start;  // -offset * sum of values
  int8_t values[kBlock];
};

struct Output {
  void* data;
  int64_t stride;
  int dtype;
  const void* bias;  // null, or as many as outputs, of bias_dtype
  int bias_dtype;
};

template <class T>
void quantize_inputs(InputBlock* out, const T* x, int64_t num_blocks, int offset) {
  for (int64_t i = 0; i < num_blocks; ++i, ++out) {
    const Vec parts[2] = {load(x + i * kBlock), load(x + i * kBlock + kLanes)};
    const float top = max_lanes(maximum(maximum(parts[0], -parts[0]), maximum(parts[1], -parts[1])));
    const float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    out->scale = top / 127.0f;
    Ints sums = {};
    for (int part = 0; part < 2; ++part) {
      // Adding 1.5 * 2^23 rounds to an integer in the low bits.
      const Ints rounded = (Ints)(parts[part] * inverse + 12582912.0f) - 0x4b400000;
      sums += rounded;
      typedef int8_t Bytes __attribute__((vector_size(16)));
      store_raw(out->values + part * kLanes, __builtin_convertvector(rounded, Bytes));
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    out->sum = out->scale * sum;
    out->start = -offset * sum;
  }
}

// sum + a * b in every lane, of which a holds four unsigned bytes and b four signed ones.
SHOAL_INLINE Sums multiply_add_bytes(Sums sum, Quads a, Quads b) {
#if defined(__AVX512VNNI__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)b, 8), 8), odd = _mm512_srai_epi16((__m512i)b, 8);
  const __m512i low = _mm512_and_si512((__m512i)a, _mm512_set1_epi16(0xff)), high = _mm512_srli_epi16((__m512i)a, 8);
  return sum + (Sums)_mm512_madd_epi16(low, even) + (Sums)_mm512_madd_epi16(high, odd);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8), odd = _mm256_srai_epi16((__m256i)b, 8);
  const __m256i low = _mm256_and_si256((__m256i)a, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16((__m256i)a, 8);
  return sum + (Sums)_mm256_madd_epi16(low, even) + (Sums)_mm256_madd_epi16(high, odd);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (Sums)vusdotq_s32((int32x4_t)sum, (uint8x16_t)a, (int8x16_t)b);
#else
  for (int byte = 0; byte < 4; ++byte, a >>= 8, b >>= 8) sum += (Sums)(a & 0xffu) * ((Sums)(b << 24) >> 24);
  return sum;
#endif
}

template <class Format>
SHOAL_INLINE Quads lower_weights(Quads words) {
  return Format::kBits == 8 ? words : words & 0x0f0f0f0fu;
}
SHOAL_INLINE Quads upper_weights(Quads words) { return (words >> 4) & 0x0f0f0f0fu; }

SHOAL_INLINE Quads input_quad(const InputBlock& block, int k) {
  uint32_t quad;
  std::memcpy(&quad, block.values + 4 * k, sizeof(quad));
  return Quads{} + quad;
}

// 32 float16 numbers.
SHOAL_INLINE void load_panel(Floats (&out)[kVectors], const Float16* from) {
  for (int i = 0; i < kPanel; i += kLanes) store_raw((float*)out + i, to_float(from + i));
}

// x: kRows rows of num_blocks blocks; out: kRows rows, of which `columns` of 32 are stored from `column` on.
template <class Format, int kRows>
void multiply_panel(const Output& out, int64_t row, int64_t column, int columns, const InputBlock* x,
                    const PanelBlock<Format>* panel, int64_t num_blocks) {
  constexpr int kWords = sizeof(panel->words) / sizeof(panel->words[0]);
  Floats totals[kRows][kVectors] = {};
  for (int64_t b = 0; b < num_blocks; ++b) {
    const PanelBlock<Format>& weights = panel[b];
    Sums sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sums[r][i] = Sums{} + x[r * num_blocks + b].start;
#pragma GCC unroll 8
    for (int k = 0; k < kWords; ++k) {
      Quads words[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) words[i] = load_raw<Quads>(weights.words[k] + i * kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const InputBlock& inputs = x[r * num_blocks + b];
        const Quads lower = input_quad(inputs, k);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i)
          sums[r][i] = multiply_add_bytes(sums[r][i], lower_weights<Format>(words[i]), lower);
        if (Format::kBits == 4) {
          const Quads upper = input_quad(inputs, k + kWords);
#pragma GCC unroll 8
          for (int i = 0; i < kVectors; ++i)
            sums[r][i] = multiply_add_bytes(sums[r][i], upper_weights(words[i]), upper);
        }
      }
    }
    Floats scales[kVectors], minima[kVectors];
    load_panel(scales, weights.scales);
    if (Format::kHasMinima) load_panel(minima, weights.minima);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const InputBlock& inputs = x[r * num_blocks + b];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        totals[r][i] = totals[r][i] + __builtin_convertvector(sums[r][i], Floats) * (scales[i] * inputs.scale);
        if (Format::kHasMinima) totals[r][i] = totals[r][i] + minima[i] * inputs.sum;
      }
    }
  }
  with_dtype(out.dtype, [&](auto* type) {
    auto* first = (decltype(type))out.data + row * out.stride + column;
    for (int i = 0; i < columns; i += kLanes) {
      const int count = columns - i < kLanes ? columns - i : kLanes;
      Vec added = {};
      if (out.bias)
        with_dtype(out.bias_dtype, [&](auto* t) { added = load((decltype(t))out.bias + column + i, count); });
      for (int r = 0; r < kRows; ++r)
        store(first + r * out.stride + i, load_raw<Vec>((float*)totals[r] + i) + added, count);
    }
  });
}

struct QuantizedLinear {
  void* out;
  const void *x, *panels, *bias;
  int64_t rows, outputs, inputs, x_stride;
  int format, x_dtype, out_dtype;
};

template <class Format>
void multiply(const QuantizedLinear& a) {
  using Multiply = decltype(&multiply_panel<Format, 1>);
  static constexpr Multiply kMultiply[] = {
      nullptr, multiply_panel<Format, 1>,
#if defined(__AVX512F__)
      multiply_panel<Format, 2>, multiply_panel<Format, 3>, multiply_panel<Format, 4>, multiply_panel<Format, 5>, multiply_panel<Format, 6>,
#endif
  };
  const int64_t num_blocks = a.inputs / kBlock;
  const int64_t num_panels = (a.outputs + kPanel - 1) / kPanel;
  const int64_t num_chunks = (a.rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto* panels = (const PanelBlock<Format>*)a.panels;
  const Output out{a.out, a.outputs, a.out_dtype, a.bias, a.x_dtype};
  static thread_local std::vector<InputBlock> memory;
  InputBlock* blocks = nullptr;
  const auto reserve = [&] {
    if ((int64_t)memory.size() < a.rows * num_blocks) memory.resize(a.rows * num_blocks);
    blocks = memory.data();
  };
  const auto quantize_row = [&](int64_t row) {
    with_dtype(a.x_dtype, [&](auto* type) {
      quantize_inputs(blocks + row * num_blocks, (decltype(type))a.x + row * a.x_stride, num_blocks, Format::kOffset);
    });
  };
  if (a.rows == 1) {  // every thread for itself: waiting for each other would take longer
    reserve();
    quantize_row(0);
  } else {
#pragma omp single copyprivate(blocks)
    reserve();
    deal_rows(a.rows, quantize_row);
  }
  deal(num_panels * num_chunks, [&](int64_t task) {
    const int64_t panel = task / num_chunks, chunk = task % num_chunks;
    const int64_t start = chunk * kRowsPerTask;
    const int64_t end = start + kRowsPerTask < a.rows ? start + kRowsPerTask : a.rows;
    const int64_t num_tiles = (end - start + kMaxRows - 1) / kMaxRows;
    const int64_t column = panel * kPanel;
    const int columns = (int)(a.outputs - column < kPanel ? a.outputs - column : kPanel);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      // Tiles of equal size, to within a row.
      const int64_t first = start + tile * (end - start) / num_tiles;
      const int64_t last = start + (tile + 1) * (end - start) / num_tiles;
      kMultiply[last - first](out, first, column, columns, blocks + first * num_blocks, panels + panel * num_blocks,
                              num_blocks);
    }
  });
}

// A block as GGUF stores it.
template <class Format>
struct StoredBlock {
  Float16 scale;
  Float16 minimum[Format::kHasMinima ? 1 : 0];
  uint8_t bytes[kBlock * Format::kBits / 8];
};
static_assert(sizeof(StoredBlock<Q8_0>) == 34 && sizeof(StoredBlock<Q4_0>) == 18 && sizeof(StoredBlock<Q4_1>) == 20);

template <class Format>
void pack(PanelBlock<Format>* panels, const StoredBlock<Format>* weight, int64_t outputs, int64_t num_blocks) {
  const int64_t num_panels = (outputs + kPanel - 1) / kPanel;
  deal(num_panels, [&](int64_t panel) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      PanelBlock<Format>& target = panels[panel * num_blocks + b];
      target = {};
      for (int64_t column = 0; column < kPanel && panel * kPanel + column < outputs; ++column) {
        StoredBlock<Format> source = weight[(panel * kPanel + column) * num_blocks + b];
        target.scales[column] = source.scale;
        if (Format::kHasMinima) target.minima[column] = source.minimum[0];
        if (Format::kBits == 8)
          for (uint8_t& byte : source.bytes) byte ^= 0x80;  // signed to unsigned with offset 128
        for (size_t k = 0; k < sizeof(source.bytes) / 4; ++k)
          std::memcpy(&target.words[k][column], source.bytes + 4 * k, 4);
      }
    }
  });
}

// One output's weights: row `id`.
template <class Format, class T>
void unpack_row(T* out, const PanelBlock<Format>* panels, int64_t id, int64_t num_blocks) {
  const int64_t column = id % kPanel;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const PanelBlock<Format>& block = panels[id / kPanel * num_blocks + b];
    constexpr int kBytes = kBlock * Format::kBits / 8;
    uint8_t bytes[kBytes];
    for (int k = 0; k < kBytes / 4; ++k) std::memcpy(bytes + 4 * k, &block.words[k][column], 4);
    float weights[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const int stored = Format::kBits == 8 ? bytes[i] : i < kBytes ? bytes[i] & 15 : bytes[i - kBytes] >> 4;
      weights[i] = stored - Format::kOffset;
    }
    // Loaded from the start of a vector, because float16 is read in vectors only.
    const float scale = load(block.scales + column, 1)[0];
    const float minimum = Format::kHasMinima ? load(block.minima + column, 1)[0] : 0.0f;
    for (int i = 0; i < kBlock; i += kLanes)
      from_float(out + b * kBlock + i, load_raw<Vec>(weights + i) * scale + minimum);
  }
}

struct PackQuantized {
  void* panels;
  const void* weight;
  int64_t outputs, inputs;
  int format;
};

struct QuantizedRows {
  void* out;
  const void* panels;
  const int64_t* ids;
  int64_t rows, inputs;
  int format, out_dtype;
};

}  // namespace

// weight: [outputs, inputs / 32] blocks as GGUF stores them -> [ceil(outputs / 32), inputs / 32] blocks of panels, zero
// beyond the outputs.
SHOAL_KERNEL(pack_quantized, PackQuantized) {
  with_format(a.format, [&](auto f) {
    using Format = decltype(f);
    pack((PanelBlock<Format>*)a.panels, (const StoredBlock<Format>*)a.weight, a.outputs, a.inputs / kBlock);
  });
}

// x: [rows, inputs], rows `x_stride` elements apart; bias: null or [outputs], of the dtype of x
// -> out: [rows, outputs], dense.
SHOAL_KERNEL(quantized_linear, QuantizedLinear) {
  with_format(a.format, [&](auto f) { multiply<decltype(f)>(a); });
}

// ids: [rows] of outputs -> out: [rows, inputs], dense: those rows of the weight.
SHOAL_KERNEL(quantized_rows, QuantizedRows) {
  with_format(a.format, [&](auto f) {
    with_dtype(a.out_dtype, [&](auto* type) {
      deal_rows(a.rows, [&](int64_t row) {
        unpack_row((decltype(type))a.out + row * a.inputs, (const PanelBlock<decltype(f)>*)a.panels, a.ids[row],
                   a.inputs / kBlock);
      });
    });
  });
}

}  // namespace shoal
