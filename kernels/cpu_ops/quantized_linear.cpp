// Matrix products with weights of 4 or 8 bits, as GGUF's types Q4_0, Q4_1 and Q8_0 store them: 32 inputs of an output
// share a float16 scale, and in Q4_1 a minimum. Inputs are rounded to 8 bits, 32 of a row sharing a scale, so that a
// block's products are integers, which add up exactly; blocks add up in float32, in order, whatever the number of rows
// and threads: a row's result does not depend on its batch.
//
// The weight lies in panels of 32 outputs. A panel holds, for every block of inputs: 32 scales, in Q4_1 32 minima, and
// words of four bytes, one output beside the other. A byte is one weight, or two: input i in its lower and i + 16 in
// its upper half. Weights are unsigned, the block's offset taken off once for all 32.
#include <vector>

#include "vec.h"

namespace shoal {
namespace {

constexpr int kBlock = 32;  // inputs
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;  // outputs
#if defined(__AVX512F__)
constexpr int kMaxRows = 6;  // 24 accumulators of 32 registers
#else
constexpr int kMaxRows = 2;
#endif
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kSerialWeights = 1 << 15;

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

template <class Format>
SHOAL_INLINE Words lower_weights(Words words) {
  return Format::kBits == 8 ? words : words & 0x0f0f0f0fu;
}
SHOAL_INLINE Words upper_weights(Words words) { return (words >> 4) & 0x0f0f0f0fu; }

SHOAL_INLINE Words input_word(const InputBlock& block, int k) {
  uint32_t word;
  std::memcpy(&word, block.values + 4 * k, sizeof(word));
  return splat_word(word);
}

// x: kRows rows of num_blocks blocks; out: kRows rows, of which `columns` of 32 are stored from `column` on.
template <class Format, int kRows>
void multiply_panel(const Output& out, int64_t row, int64_t column, int columns, const InputBlock* x,
                    const PanelBlock<Format>* panel, int64_t num_blocks) {
  constexpr int kWords = sizeof(panel->words) / sizeof(panel->words[0]);
  Vec totals[kRows][kVectors] = {};
  for (int64_t b = 0; b < num_blocks; ++b) {
    const PanelBlock<Format>& weights = panel[b];
    Ints sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVectors; ++i) sums[r][i] = Ints{} + x[r * num_blocks + b].start;
#pragma GCC unroll 8
    for (int k = 0; k < kWords; ++k) {
      Words words[kVectors];
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) words[i] = load_raw<Words>(weights.words[k] + i * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const InputBlock& inputs = x[r * num_blocks + b];
        const Words lower = input_word(inputs, k);
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i)
          sums[r][i] = multiply_add_bytes(sums[r][i], lower_weights<Format>(words[i]), lower);
        if (Format::kBits == 4) {
          const Words upper = input_word(inputs, k + kWords);
#pragma GCC unroll 2
          for (int i = 0; i < kVectors; ++i)
            sums[r][i] = multiply_add_bytes(sums[r][i], upper_weights(words[i]), upper);
        }
      }
    }
    for (int i = 0; i < kVectors; ++i) {
      const Vec scales = to_float(weights.scales + i * kLanes);
      const Vec minima = Format::kHasMinima ? to_float(weights.minima + i * kLanes) : Vec{};
      for (int r = 0; r < kRows; ++r) {
        const InputBlock& inputs = x[r * num_blocks + b];
        totals[r][i] = totals[r][i] + __builtin_convertvector(sums[r][i], Vec) * (scales * inputs.scale);
        if (Format::kHasMinima) totals[r][i] = totals[r][i] + minima * inputs.sum;
      }
    }
  }
  with_dtype(out.dtype, [&](auto* type) {
    auto* first = (decltype(type))out.data + row * out.stride + column;
    for (int i = 0; i * kLanes < columns; ++i) {
      const int count = columns - i * kLanes < kLanes ? columns - i * kLanes : kLanes;
      Vec added = {};
      if (out.bias)
        with_dtype(out.bias_dtype, [&](auto* t) { added = load((decltype(t))out.bias + column + i * kLanes, count); });
      for (int r = 0; r < kRows; ++r) store(first + r * out.stride + i * kLanes, totals[r][i] + added, count);
    }
  });
}

template <class Format>
void multiply(const Output& out, const void* x, int x_dtype, int64_t x_stride, const PanelBlock<Format>* panels,
              int64_t rows, int64_t outputs, int64_t inputs, int threads) {
  using Multiply = decltype(&multiply_panel<Format, 1>);
  static constexpr Multiply kMultiply[] = {
      nullptr, multiply_panel<Format, 1>, multiply_panel<Format, 2>,
#if defined(__AVX512F__)
      multiply_panel<Format, 3>, multiply_panel<Format, 4>, multiply_panel<Format, 5>, multiply_panel<Format, 6>,
#endif
  };
  const int64_t num_blocks = inputs / kBlock;
  const int64_t num_panels = (outputs + kPanel - 1) / kPanel;
  const int64_t num_chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  static thread_local std::vector<InputBlock> memory;
  if ((int64_t)memory.size() < rows * num_blocks) memory.resize(rows * num_blocks);
  InputBlock* blocks = memory.data();
  const auto quantize_row = [&](int64_t row) {
    with_dtype(x_dtype, [&](auto* type) {
      quantize_inputs(blocks + row * num_blocks, (decltype(type))x + row * x_stride, num_blocks, Format::kOffset);
    });
  };
  const bool is_lone = rows == 1;  // then waiting for each other would cost more than the work
  if (is_lone) quantize_row(0);
#pragma omp parallel num_threads(threads) if (outputs * inputs * rows > kSerialWeights)
  {
    if (!is_lone) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) quantize_row(row);
    }
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const int64_t start = chunk * kRowsPerTask, end = start + kRowsPerTask < rows ? start + kRowsPerTask : rows;
        const int64_t num_tiles = (end - start + kMaxRows - 1) / kMaxRows;
        const int64_t column = panel * kPanel;
        const int columns = (int)(outputs - column < kPanel ? outputs - column : kPanel);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          // Tiles of equal size, to within a row.
          const int64_t first = start + tile * (end - start) / num_tiles;
          const int64_t last = start + (tile + 1) * (end - start) / num_tiles;
          kMultiply[last - first](out, first, column, columns, blocks + first * num_blocks,
                                  panels + panel * num_blocks, num_blocks);
        }
      }
    }
  }
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
void pack(PanelBlock<Format>* panels, const StoredBlock<Format>* weight, int64_t outputs, int64_t num_blocks,
          int threads) {
  const int64_t num_panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
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
  }
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

}  // namespace

// weight: [outputs, inputs / 32] blocks as GGUF stores them -> [ceil(outputs / 32), inputs / 32] blocks of panels, zero
// beyond the outputs.
SHOAL_EXPORT void shoal_pack_quantized(void* panels, const void* weight, int64_t outputs, int64_t inputs, int format,
                                       int threads) {
  with_format(format, [&](auto f) {
    using Format = decltype(f);
    pack((PanelBlock<Format>*)panels, (const StoredBlock<Format>*)weight, outputs, inputs / kBlock, threads);
  });
}

// x: [rows, inputs], rows `x_stride` elements apart; bias: null or [outputs], of the dtype of x
// -> out: [rows, outputs], dense.
SHOAL_EXPORT void shoal_quantized_linear(void* out, const void* x, const void* panels, const void* bias, int64_t rows,
                                         int64_t outputs, int64_t inputs, int64_t x_stride, int format, int x_dtype,
                                         int out_dtype, int threads) {
  with_format(format, [&](auto f) {
    multiply({out, outputs, out_dtype, bias, x_dtype}, x, x_dtype, x_stride, (const PanelBlock<decltype(f)>*)panels,
             rows, outputs, inputs, threads);
  });
}

// ids: [rows] of outputs -> out: [rows, inputs], dense: those rows of the weight.
SHOAL_EXPORT void shoal_quantized_rows(void* out, const void* panels, const int64_t* ids, int64_t rows, int64_t inputs,
                                       int format, int out_dtype, int threads) {
  with_format(format, [&](auto f) {
    with_dtype(out_dtype, [&](auto* type) {
#pragma omp parallel for num_threads(threads) if (rows * inputs > kSerialElements)
      for (int64_t row = 0; row < rows; ++row)
        unpack_row((decltype(type))out + row * inputs, (const PanelBlock<decltype(f)>*)panels, ids[row],
                   inputs / kBlock);
    });
  });
}

}  // namespace shoal
