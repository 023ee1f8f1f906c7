// Paged attention, one path for decoding and for prompt chunks.
//
// A task is one request, one key head and a tile of queries with all query heads of the group: its rows. Keys are taken
// 64 at a time: gathered through the block table and repacked so that both products, scores = Q K^T and
// output += P V, are the same small matrix product on 32-bit words (one float, or two bfloat16 where the CPU multiplies
// those). Softmax is online (Milakov and Gimelshein, arXiv 1805.02867) with one rescale per 64 keys.
//
// Key tiles start at multiples of 64 and partial results are merged in order every kSplit keys, whether or not the parts
// ran in parallel: a row's result is bitwise the same for every batch, chunking and number of threads.
#include <algorithm>
#include <vector>

#include "vec.h"

namespace shoal {
namespace {

constexpr int kKeys = 64;             // keys of a tile
constexpr int kSplit = 512;           // keys of a part; a multiple of kKeys
constexpr int kTileRows = 48;         // rows that share one repacking of K and V
constexpr int64_t kSerialWork = 6000; // row-key pairs times key heads; less is done by the calling thread alone
const float kMinusInf = -__builtin_inff();
const float kLog2E = 1.44269504f;  // softmax runs on powers of two

#if defined(__AVX512F__)
constexpr int kRowBlock = 6;  // 6 rows x 4 vectors of accumulators fill the 32 registers
#else
constexpr int kRowBlock = 2;
#endif

struct FloatMath {
  using Element = float;
  static constexpr int kPack = 1;  // elements of a 32-bit word
  static SHOAL_INLINE Vec multiply_add(Vec sum, Words a, Words b) { return as_vec(a) * as_vec(b) + sum; }
  static SHOAL_INLINE void put(float* p, Vec v) { store(p, v); }
  template <class T>
  static SHOAL_INLINE Words row_words(const T* row, int word, int dim) {
    return (Words)load(row + word, std::min(dim - word, kLanes));
  }
  template <class T>
  static SHOAL_INLINE Words interleave(const T* const* rows, int lane, int n) {
    return (Words)load(rows[0] + lane, n);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Math {
  using Element = BFloat16;
  static constexpr int kPack = 2;
  static SHOAL_INLINE Vec multiply_add(Vec sum, Words a, Words b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static SHOAL_INLINE void put(BFloat16* p, Vec v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof(half));
  }
  static SHOAL_INLINE Words row_words(const BFloat16* row, int word, int dim) {
    const int n = dim - 2 * word;
    if (n >= 2 * kLanes) return load_raw<Words>(row + 2 * word);
    BFloat16 padded[2 * kLanes] = {};
    std::memcpy(padded, row + 2 * word, n * sizeof(BFloat16));
    return load_raw<Words>(padded);
  }
  // Lane i holds element i of two consecutive keys.
  static SHOAL_INLINE Words interleave(const BFloat16* const* rows, int lane, int n) {
    return (Words)load(rows[0] + lane, n) >> 16 | (Words)load(rows[1] + lane, n);
  }
};
#endif

// c[R][16 N] (+)= a[R][words] * b[words][16 N]
template <class M, int R, int N>
SHOAL_INLINE void multiply_block(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int words, float* c,
                                 int c_stride, bool is_added) {
  Vec sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[r][n] = is_added ? load_raw<Vec>(c + r * c_stride + n * kLanes) : Vec{};
  for (int w = 0; w < words; ++w) {
    Words right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load_raw<Words>(b + (int64_t)w * b_stride + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Words left = splat_word(a[r * a_stride + w]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = M::multiply_add(sums[r][n], left, right[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_raw(c + r * c_stride + n * kLanes, sums[r][n]);
}

template <class M, int N, int R = kRowBlock>
void multiply_rows(int rows, const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int words, float* c,
                   int c_stride, bool is_added) {
  int row = 0;
  for (; row + R <= rows; row += R)
    multiply_block<M, R, N>(a + row * a_stride, a_stride, b, b_stride, words, c + row * c_stride, c_stride, is_added);
  if constexpr (R > 1)
    if (row < rows)
      multiply_rows<M, N, R - 1>(rows - row, a + row * a_stride, a_stride, b, b_stride, words, c + row * c_stride, c_stride,
                                 is_added);
}

template <class M>
void multiply(int rows, const void* a, int a_stride, const uint32_t* b, int columns, int words, float* c, bool is_added) {
  const uint32_t* left = (const uint32_t*)a;
  int column = 0;
  for (; column + 64 <= columns; column += 64)
    multiply_rows<M, 4>(rows, left, a_stride, b + column, columns, words, c + column, columns, is_added);
  for (; column < columns; column += kLanes)
    multiply_rows<M, 1>(rows, left, a_stride, b + column, columns, words, c + column, columns, is_added);
}

// out[j][i] = in[i][j] for 16 x 16 words
SHOAL_INLINE void transpose(const Words (&in)[16], uint32_t* out, int out_stride) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j * out_stride + i] = in[i][j];
#endif
}

struct Problem {
  const char *q, *kv;
  char* out;
  const int32_t *tables, *query_starts, *context_lens;
  int64_t q_stride, block_stride, table_stride;  // the first two in elements
  int heads, kv_heads, dim, block_size, window;
  float scale, softcap;
  int group() const { return heads / kv_heads; }
  int padded_dim() const { return (dim + 31) / 32 * 32; }
};

// The queries [first, first + count) of a request against the parts [part_begin, part_end) of its context.
struct Task {
  int request, kv_head, first, count, part_begin, part_end, partial;
};

// Running softmax of some rows: values not yet divided by their sums.
struct State {
  float *values, *tops, *sums;  // [rows, padded_dim], [rows], [rows]
};

State state_at(float* memory, int rows, int padded_dim) {
  return {memory, memory + (int64_t)rows * padded_dim, memory + (int64_t)rows * (padded_dim + 1)};
}
int64_t state_size(int rows, int padded_dim) { return ((int64_t)rows * (padded_dim + 2) + 15) / 16 * 16; }

void merge(State into, State part, int rows, int padded_dim) {
  for (int row = 0; row < rows; ++row) {
    const float top = std::max(into.tops[row], part.tops[row]);
    const float safe = top == kMinusInf ? 0.0f : top;
    const Vec keep = exp2_nonpositive(splat(into.tops[row] - safe));
    const Vec add = exp2_nonpositive(splat(part.tops[row] - safe));
    into.tops[row] = top;
    into.sums[row] = into.sums[row] * keep[0] + part.sums[row] * add[0];
    for (int i = 0; i < padded_dim; i += kLanes) {
      float *a = into.values + (int64_t)row * padded_dim + i, *b = part.values + (int64_t)row * padded_dim + i;
      store(a, load(a) * keep + load(b) * add);
    }
  }
}

// What one thread needs for a task.
template <class M>
struct Scratch {
  std::vector<float> memory;
  typename M::Element *queries, *weights;  // [rows, padded_dim], [rows, kKeys]
  uint32_t *keys, *values;                 // repacked, [padded_dim / pack, kKeys] and [kKeys / pack, padded_dim]
  float* scores;                           // [rows, kKeys]
  State total, part;

  void reserve(int rows, int padded_dim) {
    const int64_t tile = (int64_t)kKeys * padded_dim, state = state_size(rows, padded_dim);
    memory.resize(16 + rows * padded_dim + 2 * rows * kKeys + 2 * tile + 2 * state);
    float* p = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    queries = (typename M::Element*)p, p += rows * padded_dim;
    weights = (typename M::Element*)p, p += rows * kKeys;
    scores = p, p += rows * kKeys;
    keys = (uint32_t*)p, p += tile;
    values = (uint32_t*)p, p += tile;
    total = state_at(p, rows, padded_dim), p += state;
    part = state_at(p, rows, padded_dim);
  }
};

template <class T, class M>
class Attention {
 public:
  Attention(const Problem& problem, const Task& task, Scratch<M>& scratch)
      : p(problem), t(task), s(scratch), rows(task.count * problem.group()), padded(problem.padded_dim()) {
    const int queries = p.query_starts[t.request + 1] - p.query_starts[t.request];
    first_position = p.context_lens[t.request] - queries + t.first;
    first_token = p.query_starts[t.request] + t.first;
    score_scale = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E;
  }

  // Leaves the parts' result in `total`.
  void run(State total) {
    load_queries();
    const int high = first_position + t.count;
    const int low = p.window > 0 ? std::max(0, first_position - p.window + 1) : 0;
    for (int part = t.part_begin; part < t.part_end; ++part) {
      const State state = part == t.part_begin ? total : s.part;
      std::fill_n(state.values, (int64_t)rows * padded, 0.0f);
      std::fill_n(state.tops, rows, kMinusInf);
      std::fill_n(state.sums, rows, 0.0f);
      const int begin = std::max(part * kSplit, low / kKeys * kKeys), end = std::min((part + 1) * kSplit, high);
      for (int base = begin; base < end; base += kKeys) add_keys(base, low, high, state);
      if (part != t.part_begin) merge(total, state, rows, padded);
    }
  }

  void write(State total) {
    for (int row = 0; row < rows; ++row) {
      T* to = (T*)p.out + ((int64_t)(first_token + row / p.group()) * p.heads + head_of(row)) * p.dim;
      const float inverse = 1.0f / total.sums[row];
      for_lanes(p.dim, [&](int i, int n) { store(to + i, load(total.values + row * padded + i) * inverse, n); });
    }
  }

 private:
  int head_of(int row) const { return t.kv_head * p.group() + row % p.group(); }

  void load_queries() {
    for (int row = 0; row < rows; ++row) {
      const T* from =
          (const T*)p.q + (int64_t)(first_token + row / p.group()) * p.q_stride + (int64_t)head_of(row) * p.dim;
      typename M::Element* to = s.queries + row * padded;
      std::fill_n((char*)to, padded * sizeof(*to), 0);
      for_lanes(p.dim, [&](int i, int n) { M::put(to + i, load(from + i, n)); });
    }
  }

  void add_keys(int base, int low, int high, State state) {
    static const T zeros[1024] = {};
    const T *keys[kKeys], *values[kKeys];
    const int32_t* table = p.tables + t.request * p.table_stride;
    const int64_t value_offset = (int64_t)p.kv_heads * p.block_size * p.dim;
    // Keys outside the context, or in blocks that no row sees, may be anything, NaN too.
    const int readable = low / p.block_size * p.block_size;
    for (int j = 0; j < kKeys;) {
      const int position = base + j;
      if (position < readable || position >= high) {
        keys[j] = values[j] = zeros, ++j;
        continue;
      }
      const int offset = position % p.block_size;
      const int run = std::min({p.block_size - offset, kKeys - j, high - position});
      const T* row = (const T*)p.kv + table[position / p.block_size] * p.block_stride +
                     ((int64_t)t.kv_head * p.block_size + offset) * p.dim;
      for (int i = 0; i < run; ++i, ++j, row += p.dim) keys[j] = row, values[j] = row + value_offset;
    }
    pack_keys(keys);
    multiply<M>(rows, s.queries, padded / M::kPack, s.keys, kKeys, padded / M::kPack, s.scores, false);
    for (int row = 0; row < rows; ++row) soften(row, base, state);
    pack_values(values);
    multiply<M>(rows, s.weights, kKeys / M::kPack, s.values, padded, kKeys / M::kPack, state.values, true);
  }

  void pack_keys(const T* const* keys) {
    for (int j = 0; j < kKeys; j += kLanes)
      for (int word = 0; word < padded / M::kPack; word += kLanes) {
        Words block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = word * M::kPack < p.dim ? M::row_words(keys[j + i], word, p.dim) : Words{};
        transpose(block, s.keys + word * kKeys + j, kKeys);
      }
  }

  void pack_values(const T* const* values) {
    for (int j = 0; j < kKeys; j += M::kPack)
      for (int i = 0; i < padded; i += kLanes)
        store_raw(s.values + j / M::kPack * padded + i,
                  i < p.dim ? M::interleave(values + j, i, std::min(p.dim - i, kLanes)) : Words{});
  }

  // Turns a row of scores into weights, rescaling what the row has gathered so far.
  void soften(int row, int base, State state) {
    const int position = first_position + row / p.group();
    const int end = position + 1 - base, begin = p.window > 0 ? end - p.window : 0;
    constexpr int kVecs = kKeys / kLanes;
    Vec scores[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) scores[v] = load_raw<Vec>(s.scores + row * kKeys + v * kLanes) * score_scale;
    if (p.softcap > 0)
      for (int v = 0; v < kVecs; ++v) scores[v] = p.softcap * kLog2E * tanh(scores[v]);
    if (begin > 0 || end < kKeys)
      for (int v = 0; v < kVecs; ++v) {
        const Ints lane = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + v * kLanes;
        scores[v] = select((lane >= begin) & (lane < end), scores[v], splat(kMinusInf));
      }
    const float highest =
        max_lanes(maximum(maximum(scores[0], scores[1]), maximum(scores[2], scores[3])));
    const float before = state.tops[row], now = std::max(before, highest);
    const float safe = now == kMinusInf ? 0.0f : now;
    Vec sum{};
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      scores[v] = exp2_nonpositive(scores[v] - safe);
      sum += scores[v];
      M::put(s.weights + row * kKeys + v * kLanes, scores[v]);
    }
    const float total = sum_lanes(sum);
    state.tops[row] = now;
    if (now == before) {
      state.sums[row] += total;
      return;
    }
    const Vec keep = exp2_nonpositive(splat(before - safe));
    state.sums[row] = state.sums[row] * keep[0] + total;
    for (int i = 0; i < padded; i += kLanes) {
      float* value = state.values + (int64_t)row * padded + i;
      store_raw(value, load_raw<Vec>(value) * keep);
    }
  }

  const Problem& p;
  const Task& t;
  Scratch<M>& s;
  const int rows, padded;
  int first_position, first_token;
  float score_scale;
};

template <class T, class M>
void attend(const Problem& p, int requests, int threads) {
  const int tile = std::max(1, kTileRows / p.group()), padded = p.padded_dim();
  std::vector<Task> tasks;
  int64_t work = 0;
  int most_rows = 1;
  for (int request = 0; request < requests; ++request) {
    const int queries = p.query_starts[request + 1] - p.query_starts[request];
    const int position = p.context_lens[request] - queries;
    // The longest tasks, those of the last queries, first.
    for (int first = (queries - 1) / tile * tile; queries > 0 && first >= 0; first -= tile) {
      const int count = std::min(tile, queries - first), high = position + first + count;
      const int low = p.window > 0 ? std::max(0, position + first - p.window + 1) : 0;
      for (int head = 0; head < p.kv_heads; ++head)
        tasks.push_back({request, head, first, count, low / kSplit, (high - 1) / kSplit + 1, 0});
      most_rows = std::max(most_rows, count * p.group());
      work += (int64_t)count * p.heads * (high - low);
    }
  }
  if (work < kSerialWork) threads = 1;

  // With too few tasks to go round, the parts of each become tasks of their own.
  std::vector<Task> whole;
  std::vector<float> partials;
  const int64_t partial_size = state_size(most_rows, padded);
  int parts = 0;
  for (Task& task : tasks) task.partial = parts, parts += task.part_end - task.part_begin;
  if (threads > 1 && (int)tasks.size() < 4 * threads && parts > (int)tasks.size()) {
    whole.swap(tasks);
    for (const Task& task : whole)
      for (int part = task.part_begin; part < task.part_end; ++part)
        tasks.push_back({task.request, task.kv_head, task.first, task.count, part, part + 1,
                         task.partial + part - task.part_begin});
    partials.resize(parts * partial_size);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch<M> scratch;
    scratch.reserve(most_rows, padded);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < (int)tasks.size(); ++i) {
      Attention<T, M> attention(p, tasks[i], scratch);
      if (whole.empty()) {
        attention.run(scratch.total);
        attention.write(scratch.total);
      } else {
        attention.run(state_at(partials.data() + tasks[i].partial * partial_size, most_rows, padded));
      }
    }
#pragma omp for schedule(static)
    for (int i = 0; i < (int)whole.size(); ++i) {
      const Task& task = whole[i];
      const auto partial = [&](int n) {
        return state_at(partials.data() + (task.partial + n) * partial_size, most_rows, padded);
      };
      for (int n = 1; n < task.part_end - task.part_begin; ++n)
        merge(partial(0), partial(n), task.count * p.group(), padded);
      Attention<T, M>(p, task, scratch).write(partial(0));
    }
  }
}

template <class T>
struct MathFor {
  using type = FloatMath;
};
#if defined(__AVX512BF16__)
template <>
struct MathFor<BFloat16> {
  using type = BFloat16Math;
};
#endif

}  // namespace

// window and softcap 0 are off.
SHOAL_EXPORT void shoal_attention(void* out, const void* q, const void* kv, const int32_t* tables,
                                const int32_t* query_starts, const int32_t* context_lens, int requests, int heads,
                                int kv_heads, int dim, int block_size, int64_t q_stride, int64_t block_stride,
                                int64_t table_stride, int window, float scale, float softcap, int dtype, int threads) {
  const Problem problem{(const char*)q, (const char*)kv,  (char*)out,   tables,       query_starts,
                        context_lens,   q_stride,         block_stride, table_stride, heads,
                        kv_heads,       dim,              block_size,   window,       scale,
                        softcap};
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attend<T, typename MathFor<T>::type>(problem, requests, threads);
  });
}

}  // namespace shoal
