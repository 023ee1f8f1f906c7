// Matrix products of bfloat16 operands, summed in float32. The weight lies in panels of 48 outputs, two inputs side by
// side, as the dot instructions want it. A product adds up its inputs in order, whatever the number of rows and threads:
// a row's result does not depend on its batch.
//
// Against oneDNN through torch it was 1.5 times as fast up to 16 rows (Zen 4), where reading the weight is all there is to
// do, and it can answer in float32.
#include "activation.h"
#include "kernel.h"

namespace shoal {
namespace {

constexpr int kVectors = 3;
constexpr int kPanel = kVectors * kLanes;  // outputs of a panel; divides the usual widths
// 24 accumulators of 32 registers, and 11 loads for 24 products: loads bound narrower shapes.
constexpr int kMaxRows = 8;
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kAhead = 2048;  // words by which a lone block fetches ahead

// x: kRows rows of `pairs` input pairs; panel: [pairs][48] weight pairs; bias: null or `columns` values;
// out: kRows rows, of which the first `columns` of 48 are stored. Meanwhile, `lines` cache lines a pair are fetched from
// `ahead` on.
template <int kRows, class T>
void multiply_panel(T* out, int64_t out_stride, const uint32_t* x, int64_t x_stride, const uint32_t* panel,
                    const BFloat16* bias, int64_t pairs, int columns, const uint32_t* ahead, int lines) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    for (int line = 0; line < lines; ++line, ahead += kLanes) __builtin_prefetch(ahead, 0, 2);
    Words weights[kVectors];
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) weights[i] = load_raw<Words>(panel + k * kPanel + i * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Words pair = splat_word(x[row * x_stride + k]);
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) sums[row][i] = multiply_add_pairs(sums[row][i], weights[i], pair);
    }
  }
  for (int i = 0; i * kLanes < columns; ++i) {
    const int count = columns - i * kLanes < kLanes ? columns - i * kLanes : kLanes;
    const Vec added = bias ? load(bias + i * kLanes, count) : Vec{};
    for (int row = 0; row < kRows; ++row) store(out + row * out_stride + i * kLanes, sums[row][i] + added, count);
  }
}

template <class T>
using Multiply = decltype(&multiply_panel<1, T>);
template <class T>
constexpr Multiply<T> kMultiply[kMaxRows + 1] = {
    nullptr,
    multiply_panel<1, T>, multiply_panel<2, T>, multiply_panel<3, T>, multiply_panel<4, T>,
    multiply_panel<5, T>, multiply_panel<6, T>, multiply_panel<7, T>, multiply_panel<8, T>,
};

// Calls body(panel, first, last, ahead, lines) for blocks of at most kMaxRows rows, of equal size to within a row: which
// panel they are to be multiplied by, and what is to be fetched meanwhile, as an offset to that panel in words.
template <class Body>
void for_blocks(int64_t num_panels, int64_t rows, int64_t pairs, Body body) {
  const int64_t num_chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  deal(num_panels * num_chunks, [&](int64_t task) {
    const int64_t panel = task / num_chunks, chunk = task % num_chunks;
    const int64_t start = chunk * kRowsPerTask, end = start + kRowsPerTask < rows ? start + kRowsPerTask : rows;
    const int64_t num_blocks = (end - start + kMaxRows - 1) / kMaxRows;
    // The first of several blocks would wait for memory and the others leave it idle: they fetch the next panel
    // together. A lone block of few rows is as fast as memory by itself.
    const bool is_lone = num_blocks == 1;
    const int64_t ahead = is_lone ? kAhead : panel + 1 < num_panels ? pairs * kPanel : 0;
    const int lines = is_lone ? (end - start > 4 ? 3 : 0) : num_blocks == 2 ? 2 : 1;
    for (int64_t block = 0; block < num_blocks; ++block)
      body(panel, start + block * (end - start) / num_blocks, start + (block + 1) * (end - start) / num_blocks,
           ahead + block * lines * kLanes * pairs, block < kVectors ? lines : 0);
  });
}

struct LinearCall {
  void* out;
  const uint32_t *x, *panels;  // pairs of bfloat16
  const BFloat16* bias;        // or null
  int64_t rows, outputs, inputs, x_stride;
  int is_float;  // out
};

template <class T>
void multiply(const LinearCall& a) {
  const int64_t pairs = a.inputs / 2, x_stride = a.x_stride / 2;
  for_blocks((a.outputs + kPanel - 1) / kPanel, a.rows, pairs,
             [&](int64_t panel, int64_t first, int64_t last, int64_t ahead, int lines) {
               const uint32_t* weights = a.panels + panel * pairs * kPanel;
               const int64_t column = panel * kPanel;
               const int columns = (int)(a.outputs - column < kPanel ? a.outputs - column : kPanel);
               kMultiply<T>[last - first]((T*)a.out + first * a.outputs + column, a.outputs, a.x + first * x_stride,
                                          x_stride, weights, a.bias ? a.bias + column : nullptr, pairs, columns,
                                          weights + ahead, lines);
             });
}

struct GatedLinearCall {
  BFloat16* out;
  const uint32_t *x, *panels;  // those of the gate, then those of up
  const BFloat16* bias;        // or null
  int64_t rows, inter, inputs, x_stride;
  int is_gelu;
};

struct PackPanels {
  uint32_t* panels;
  const uint32_t* weight;
  int64_t outputs, inputs;
};

}  // namespace

// weight: [outputs, inputs] bfloat16, inputs even -> panels [ceil(outputs / 48)][inputs / 2][48][2], zero-padded.
SHOAL_KERNEL(pack_panels, PackPanels) {
  const int64_t pairs = a.inputs / 2, num_panels = (a.outputs + kPanel - 1) / kPanel;
  deal(num_panels, [&](int64_t panel) {
    uint32_t* target = a.panels + panel * pairs * kPanel;
    const uint32_t* source = a.weight + panel * kPanel * pairs;
    const int64_t columns = a.outputs - panel * kPanel < kPanel ? a.outputs - panel * kPanel : kPanel;
    for (int64_t k = 0; k < pairs; ++k)
      for (int64_t column = 0; column < kPanel; ++column)
        target[k * kPanel + column] = column < columns ? source[column * pairs + k] : 0;
  });
}

// x: [rows, inputs] bfloat16, rows `x_stride` elements apart (even); bias: null or [outputs] bfloat16
// -> out: [rows, outputs], float32 or bfloat16, dense.
SHOAL_KERNEL(linear, LinearCall) { a.is_float ? multiply<float>(a) : multiply<BFloat16>(a); }

// x: as above; panels of [gate; up], each with `inter` outputs, a multiple of 48; bias: null or [2 * inter] bfloat16
// -> out: [rows, inter] bfloat16 = activation(gate) * up, rounded once.
SHOAL_KERNEL(gated_linear, GatedLinearCall) {
  const int64_t pairs = a.inputs / 2, x_stride = a.x_stride / 2, num_panels = a.inter / kPanel;
  for_blocks(num_panels, a.rows, pairs, [&](int64_t panel, int64_t first, int64_t last, int64_t ahead, int lines) {
    float gates[kMaxRows * kPanel], ups[kMaxRows * kPanel];
    const uint32_t *gate = a.panels + panel * pairs * kPanel, *up = gate + num_panels * pairs * kPanel;
    const BFloat16* bias = a.bias ? a.bias + panel * kPanel : nullptr;
    const auto multiply = kMultiply<float>[last - first];
    const uint32_t* x = a.x + first * x_stride;
    multiply(gates, kPanel, x, x_stride, gate, bias, pairs, kPanel, gate + ahead, lines);
    multiply(ups, kPanel, x, x_stride, up, bias ? bias + a.inter : nullptr, pairs, kPanel, up + ahead, lines);
    for (int64_t row = first; row < last; ++row)
      for (int i = 0; i < kPanel; i += kLanes) {
        const Vec g = load(gates + (row - first) * kPanel + i), u = load(ups + (row - first) * kPanel + i);
        store(a.out + row * a.inter + panel * kPanel + i, (a.is_gelu ? gelu_tanh(g) : silu(g)) * u);
      }
  });
}

}  // namespace shoal
