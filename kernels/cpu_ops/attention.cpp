// Paged attention, one path for decoding and for prompt chunks, reading the pool in the layout of kv_layout.h.
//
// A task is one request, one key head and some queries with all query heads of the group: its rows. The unit of keys is
// a key vector: up to 16 neighbouring keys of a block, one per lane. Eight of them make a tile, for which a few rows at a
// time compute scores = Q K^T, softmax weights and output += P V. Softmax is online (Milakov and Gimelshein, arXiv
// 1805.02867) with one rescale per tile.
//
// Tiles start at multiples of eight key vectors and partial results are merged in order every kPart vectors, whether or
// not the parts ran in parallel: a row's result is bitwise the same for every batch, chunking and number of threads.
#include <algorithm>
#include <array>
#include <climits>
#include <vector>

#include "kernel.h"
#include "kv_layout.h"

namespace shoal {
namespace {

constexpr int kHalf = 4;               // key vectors whose scores are computed together
constexpr int kTile = 2 * kHalf;       // key vectors of a tile
constexpr int kKeys = kTile * kLanes;  // keys of a tile
constexpr int kPart = 32;              // key vectors of a part; a multiple of kTile
constexpr int kTaskRows = 48;          // rows that share one pass over K and V
const float kMinusInf = -__builtin_inff();
const float kLog2E = 1.44269504f;  // softmax runs on powers of two

#if defined(__AVX512F__)
constexpr int kRowBlock = 6;  // 6 rows x 4 vectors of accumulators fill the 32 registers
#else
constexpr int kRowBlock = 2;
#endif

// Products of words: one element each, as a float.
template <class T>
struct SingleMath {
  static constexpr int kPack = 1;
  using Operand = float;  // of queries and weights
  static SHOAL_INLINE Words words(const T* p) { return (Words)to_float(p); }
  static SHOAL_INLINE Vec multiply_add(Vec sum, Words a, Words b) { return as_vec(a) * as_vec(b) + sum; }
};

// Products of words: two bfloat16 each.
struct PairMath {
  static constexpr int kPack = 2;
  using Operand = BFloat16;
  static SHOAL_INLINE Words words(const BFloat16* p) { return load_raw<Words>(p); }
  static SHOAL_INLINE Vec multiply_add(Vec sum, Words a, Words b) { return multiply_add_pairs(sum, a, b); }
};

// Into the second-level cache: a Zen 4 core reads scattered blocks at 21 GB/s so, at 14 by fetching into the first and at
// 13 without.
SHOAL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// c[R][16 N] = a[R][words] * b[words][16 N] (+ keep[R] * c), where b(word, n) is a vector of b.
// Not inlined: within its caller, compilers run out of registers.
template <class M, int R, int N, class B>
__attribute__((noinline)) void multiply_add(const uint32_t* a, int a_stride, int words, float* c, int c_stride,
                                            const float* keep, B b) {
  Vec sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[r][n] = keep ? load_raw<Vec>(c + r * c_stride + n * kLanes) * keep[r] : Vec{};
  for (int w = 0; w < words; ++w) {
    Words right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = b(w, n);
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

struct Problem {
  const char *q, *kv;
  char* out;
  const int32_t *tables, *query_starts, *context_lens;
  int64_t q_stride, block_stride, table_stride;  // the first two in elements
  int heads, kv_heads, dim, block_size, window;
  float scale, softcap;
  int block_vectors;  // key vectors of a block
  int group() const { return heads / kv_heads; }
  int padded_dim() const { return (dim + kLanes - 1) / kLanes * kLanes; }
  // The key vector that holds a position.
  int vector_of(int position) const {
    return position / block_size * block_vectors + position % block_size / kLanes;
  }
};

// The queries [first, first + count) of a request against the parts [part_begin, part_end) of its context.
struct Task {
  int request, kv_head, first, count, part_begin, part_end, partial;
};

// Running softmax of some rows: values not yet divided by their sums.
struct State {
  float *values, *sums, *tops;  // [rows, padded_dim], [rows, kLanes], [rows]
};

State state_at(float* memory, int64_t rows, int padded_dim) {
  return {memory, memory + rows * padded_dim, memory + rows * (padded_dim + kLanes)};
}
int64_t state_size(int64_t rows, int padded_dim) { return (rows * (padded_dim + kLanes + 1) + 15) / 16 * 16; }

void merge(State into, State part, int rows, int padded_dim) {
  for (int row = 0; row < rows; ++row) {
    const float top = std::max(into.tops[row], part.tops[row]);
    const float safe = top == kMinusInf ? 0.0f : top;
    const Vec keep = exp2_nonpositive(splat(into.tops[row] - safe));
    const Vec add = exp2_nonpositive(splat(part.tops[row] - safe));
    const auto join = [&](float* a, const float* b) { store(a, load(a) * keep + load(b) * add); };
    into.tops[row] = top;
    join(into.sums + row * kLanes, part.sums + row * kLanes);
    for (int64_t i = (int64_t)row * padded_dim; i < (int64_t)(row + 1) * padded_dim; i += kLanes)
      join(into.values + i, part.values + i);
  }
}

// The key vectors [first, end) that some row of a task sees.
struct Span {
  int first, end;
};

Span span_of(const Problem& p, const Task& t) {
  const int queries = p.query_starts[t.request + 1] - p.query_starts[t.request];
  const int position = p.context_lens[t.request] - queries + t.first;
  const int low = p.window > 0 ? std::max(0, position - p.window + 1) : 0;
  return {std::max(t.part_begin * kPart, p.vector_of(low)),
          std::min(t.part_end * kPart, p.vector_of(position + t.count - 1) + 1)};
}

// A key vector: where its keys and values lie in the pool, the position of its first lane and the number of its lanes.
template <class T>
struct KeyVector {
  const T *keys, *values;
  int position, lanes;
};

template <class T, class M>
KeyVector<T> find(const Problem& p, const Task& t, int vector) {
  const int index = vector / p.block_vectors, offset = (vector - index * p.block_vectors) * kLanes;
  const int64_t block = p.tables[t.request * p.table_stride + index], head_size = (int64_t)p.block_size * p.dim;
  const T* head = (const T*)p.kv + block * p.block_stride + t.kv_head * head_size;
  return {head + offset * M::kPack, head + p.kv_heads * head_size + (int64_t)offset * p.dim,
          index * p.block_size + offset, std::min(kLanes, p.block_size - offset)};
}

// The key vectors of a tile, of one head: where their words lie, and which lanes are keys.
template <class T>
struct Tile {
  std::array<const T*, kTile> keys;
  const T* values[kKeys];              // by word
  int key_stride;                      // elements between a key vector's words
  int positions[kTile], lanes[kTile];  // lanes: none for a vector that no row sees
  int end_position;                    // behind all keys that are scored; past every context if a lane is none
  int first_word, end_word;            // of the values that rows see
  int num_scored;                      // key vectors from the first to the last that rows see, in whole halves
  // Of the key vectors that come as many later as a tile has, fetched meanwhile.
  std::array<const T*, kTile> next_keys, next_values;
};

// What one thread needs for a task.
template <class T, class M>
struct Scratch {
  std::vector<float> memory;
  uint32_t *queries, *weights;  // [rows, dim / pack], [kRowBlock, kKeys / pack]
  float* scores;                // [kRowBlock, kKeys]
  T *keys, *values;             // [kTile, dim / pack, kLanes, pack], [kKeys / pack, padded_dim, pack]
  State total, part;

  void reserve(int rows, int padded_dim) {
    const int64_t queries_size = rows * padded_dim, tile = kKeys * padded_dim, state = state_size(rows, padded_dim);
    memory.resize(16 + queries_size + 2 * kRowBlock * kKeys + 2 * tile + 2 * state);
    float* p = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    queries = (uint32_t*)p, p += queries_size;
    weights = (uint32_t*)p, p += kRowBlock * kKeys;
    scores = p, p += kRowBlock * kKeys;
    keys = (T*)p, p += tile;
    values = (T*)p, p += tile;
    total = state_at(p, rows, padded_dim), p += state;
    part = state_at(p, rows, padded_dim);
  }
};

template <class T, class M>
class Attention {
 public:
  // `next` is the task that this thread will likely do next.
  Attention(const Problem& problem, const Task& task, const Task& next, Scratch<T, M>& scratch)
      : p(problem), t(task), next(next), s(scratch), rows(task.count * problem.group()), padded(problem.padded_dim()) {
    const int queries = p.query_starts[t.request + 1] - p.query_starts[t.request];
    context = p.context_lens[t.request];
    first_position = context - queries + t.first;
    first_token = p.query_starts[t.request] + t.first;
    score_scale = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E;
  }

  // Leaves the parts' result in `total`.
  void run(State total) {
    load_queries();
    const auto [first, end] = span_of(p, t);
    for (int part = t.part_begin; part < t.part_end; ++part) {
      const State state = part == t.part_begin ? total : s.part;
      std::fill_n(state.values, (int64_t)rows * padded, 0.0f);
      std::fill_n(state.tops, rows, kMinusInf);
      std::fill_n(state.sums, (int64_t)rows * kLanes, 0.0f);
      const int stop = std::min((part + 1) * kPart, end);
      for (int base = std::max(part * kPart, first / kTile * kTile); base < stop; base += kTile)
        add_tile(locate(base, {first, end}), state);
      if (part != t.part_begin) merge(total, state, rows, padded);
    }
  }

  void write(State total) {
    for (int row = 0; row < rows; ++row) {
      T* to = (T*)p.out + ((int64_t)(first_token + row / p.group()) * p.heads + head_of(row)) * p.dim;
      const float inverse = 1.0f / sum_lanes(load(total.sums + row * kLanes));
      for_lanes(p.dim, [&](int i, int n) { store(to + i, load(total.values + row * padded + i) * inverse, n); });
    }
  }

 private:
  int head_of(int row) const { return t.kv_head * p.group() + row % p.group(); }

  void load_queries() {
    for (int row = 0; row < rows; ++row) {
      const T* from =
          (const T*)p.q + (int64_t)(first_token + row / p.group()) * p.q_stride + (int64_t)head_of(row) * p.dim;
      auto* to = (typename M::Operand*)s.queries + (int64_t)row * p.dim;
      for_lanes(p.dim, [&](int i, int n) { store(to + i, load(from + i, n), n); });
    }
  }

  // The tile at key vector `base`. Vectors that no row sees may lie in no block, or in one that is not this request's
  // any more: they repeat a neighbour and count for nothing.
  Tile<T> locate(int base, Span seen) {
    const int first = std::max(base, seen.first), end = std::min(base + kTile, seen.end);
    Tile<T> tile;
    tile.key_stride = (p.block_size % kLanes ? kLanes : p.block_size) * M::kPack;
    tile.first_word = (first - base) * (kLanes / M::kPack), tile.end_word = (end - base) * (kLanes / M::kPack);
    tile.num_scored = (end - base + kHalf - 1) / kHalf * kHalf;
    tile.end_position = 0;
    const Span after = span_of(p, next);
    const int distance = std::min(kTile, seen.end - seen.first);
    for (int n = 0; n < kTile; ++n) {
      const int index = std::min(std::max(base + n, first), end - 1);
      const KeyVector<T> vector = find<T, M>(p, t, index);
      tile.keys[n] = p.block_size % kLanes ? copy_keys(vector.keys, vector.lanes, n) : vector.keys;
      tile.positions[n] = vector.position;
      tile.lanes[n] = index == base + n ? vector.lanes : 0;
      if (n < tile.num_scored)
        tile.end_position = std::max(tile.end_position, tile.lanes[n] < kLanes ? INT_MAX : vector.position + kLanes);
      place_values(tile, n, vector.values, std::min(vector.lanes, context - vector.position));
      const int ahead = index + distance, beyond = ahead - seen.end;
      const KeyVector<T> later = beyond < 0 ? find<T, M>(p, t, ahead)
                                            : find<T, M>(p, next, std::min(after.first + beyond, after.end - 1));
      tile.next_keys[n] = later.keys, tile.next_values[n] = later.values;
    }
    return tile;
  }

  // A key vector of fewer than 16 lanes, copied so that its words are whole vectors.
  const T* copy_keys(const T* keys, int lanes, int n) {
    T* to = s.keys + (int64_t)n * p.dim * kLanes;
    for (int i = 0; i < p.dim; i += M::kPack)
      std::memcpy(to + i * kLanes, keys + (int64_t)i * p.block_size, lanes * M::kPack * sizeof(T));
    return to;
  }

  // Values of `used` keys. Those of slots never written may be NaN, which a weight of 0 does not hide: they read as 0.
  void place_values(Tile<T>& tile, int n, const T* values, int used) {
    constexpr int kPack = M::kPack;
    for (int word = 0; word < kLanes / kPack; ++word) {
      const int row = n * (kLanes / kPack) + word, keys = std::min(used - word * kPack, kPack);
      const T* from = values + (int64_t)word * p.dim * kPack;
      if (keys == kPack && padded == p.dim) {
        tile.values[row] = from;
        continue;
      }
      T* to = s.values + (int64_t)row * padded * kPack;
      std::fill_n(to, padded * kPack, T{});
      for (int i = 0; i < p.dim; ++i)
        for (int key = 0; key < keys; ++key) to[i * kPack + key] = from[i * kPack + key];
      tile.values[row] = to;
    }
  }

  void add_tile(const Tile<T>& tile, State state) {
    int row = 0;
    for (; row + kRowBlock <= rows; row += kRowBlock) add_rows<kRowBlock>(tile, row, state);
    add_last_rows<kRowBlock - 1>(tile, row, state);
  }

  template <int R>
  void add_last_rows(const Tile<T>& tile, int row, State state) {
    if constexpr (R > 0) {
      if (rows - row == R) return add_rows<R>(tile, row, state);
      add_last_rows<R - 1>(tile, row, state);
    }
  }

  template <int R>
  void add_rows(const Tile<T>& tile, int row, State state) {
    const int words = p.dim / M::kPack;
    const bool is_first = row == 0;
    for (int half = 0; half < tile.num_scored; half += kHalf)
      multiply_add<M, R, kHalf>(
          s.queries + (int64_t)row * words, words, words, s.scores + half * kLanes, kKeys, nullptr,
          [keys = tile.keys.data() + half, next = tile.next_keys.data() + half, stride = (int64_t)tile.key_stride,
           is_first](int w, int n) {
            if (is_first) prefetch(next[n] + w * stride);
            return M::words(keys[n] + w * stride);
          });
    float keep[kLanes];
    soften(tile, row, R, state, keep);
    float* values = state.values + (int64_t)row * padded;
    int column = 0;
    for (; column + 4 * kLanes <= padded; column += 4 * kLanes)
      add_values<R, 4>(tile, column, values + column, keep, is_first);
    for (; column < padded; column += kLanes) add_values<R, 1>(tile, column, values + column, keep, is_first);
  }

  template <int R, int N>
  SHOAL_INLINE void add_values(const Tile<T>& tile, int column, float* values, const float* keep, bool is_first) {
    const T* const* from = tile.values + tile.first_word;
    constexpr int kWords = kLanes / M::kPack;  // of a key vector
    const int64_t line = (int64_t)column / kLanes * kWords;
    multiply_add<M, R, N>(
        s.weights + tile.first_word, kKeys / M::kPack, tile.end_word - tile.first_word, values, padded, keep,
        [from, column, next = tile.next_values.data() + tile.first_word / kWords, line, is_first](int w, int n) {
          if (is_first) prefetch(next[w / kWords] + (line + w % kWords * N + n) * kLanes * M::kPack);
          return M::words(from[w] + (column + n * kLanes) * M::kPack);
        });
  }

  // One function for every number of rows: compilers differ from one expansion to the next in which sums and products
  // they fuse, and a row's bits must not.
  __attribute__((noinline)) void soften(const Tile<T>& tile, int row, int count, State state, float* keep) {
    // Without a softcap, scores stay as they are until they are used: where no key is masked they are only read here.
    const bool is_plain = p.softcap <= 0 && score_scale > 0;
    float highest[kLanes] = {};
    for (int r = 0; r < count; ++r) {
      const int end = first_position + (row + r) / p.group() + 1, begin = p.window > 0 ? end - p.window : 0;
      float* scores = s.scores + r * kKeys;
      Vec top = splat(kMinusInf);
      if (is_plain && begin <= tile.positions[0] && end >= tile.end_position) {
#pragma GCC unroll 4
        for (int n = 0; n < tile.num_scored; ++n) top = maximum(top, load(scores + n * kLanes));
      } else {
        for (int n = 0; n < tile.num_scored; ++n) {
          Vec score = load(scores + n * kLanes);
          if (!is_plain) score *= score_scale;
          if (p.softcap > 0) score = p.softcap * kLog2E * tanh(score);
          const int from = begin - tile.positions[n], to = std::min(end - tile.positions[n], tile.lanes[n]);
          if (from > 0 || to < kLanes) {
            const Ints lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            score = select((lane >= from) & (lane < to), score, splat(kMinusInf));
          }
          top = maximum(top, score);
          store(scores + n * kLanes, score);
        }
      }
      highest[r] = max_lanes(top);
    }
    const float scale = is_plain ? score_scale : 1.0f;
    const Vec before = load(state.tops + row, count), now = maximum(before, load(highest) * scale);
    const Vec safe = select(now == kMinusInf, Vec{}, now);
    store(state.tops + row, now, count);
    store(keep, exp2_nonpositive(before - safe));
    store(highest, safe);
    for (int r = 0; r < count; ++r) {
      float* sums = state.sums + (row + r) * kLanes;
      Vec sum = load(sums) * keep[r];
#pragma GCC unroll 4
      for (int n = 0; n < tile.num_scored; ++n) {
        const Vec weight = exp2_nonpositive(load(s.scores + r * kKeys + n * kLanes) * scale - highest[r]);
        sum += weight;
        store((typename M::Operand*)s.weights + r * kKeys + n * kLanes, weight);
      }
      store(sums, sum);
    }
  }

  const Problem& p;
  const Task &t, &next;
  Scratch<T, M>& s;
  const int rows, padded;
  int context, first_position, first_token;
  float score_scale;
};

// Called by every thread of a team. Each lists the same tasks, which takes less than handing them round.
template <class T, class M>
void attend(const Problem& p, int requests) {
  static thread_local std::vector<Task> tasks, whole;
  static thread_local Scratch<T, M> scratch;
  static thread_local std::vector<float> memory;
  const int tile = std::max(1, kTaskRows / p.group()), padded = p.padded_dim(), threads = team.threads;
  tasks.clear(), whole.clear();
  int most_rows = 1, parts = 0;
  for (int request = 0; request < requests; ++request) {
    const int queries = p.query_starts[request + 1] - p.query_starts[request];
    const int position = p.context_lens[request] - queries;
    // The longest tasks, those of the last queries, first.
    for (int first = (queries - 1) / tile * tile; queries > 0 && first >= 0; first -= tile) {
      const int count = std::min(tile, queries - first), high = position + first + count;
      const int low = p.window > 0 ? std::max(0, position + first - p.window + 1) : 0;
      const int part_begin = p.vector_of(low) / kPart, part_end = p.vector_of(high - 1) / kPart + 1;
      for (int head = 0; head < p.kv_heads; ++head, parts += part_end - part_begin)
        tasks.push_back({request, head, first, count, part_begin, part_end, parts});
      most_rows = std::max(most_rows, count * p.group());
    }
  }
  scratch.reserve(most_rows, padded);

  // With too few tasks to go round, the parts of each become tasks of their own.
  const int64_t partial_size = state_size(most_rows, padded);
  float* partials = nullptr;
  if (threads > 1 && (int)tasks.size() < 4 * threads && parts > (int)tasks.size()) {
    whole.swap(tasks);
    for (const Task& task : whole)
      for (int part = task.part_begin; part < task.part_end; ++part)
        tasks.push_back({task.request, task.kv_head, task.first, task.count, part, part + 1,
                         task.partial + part - task.part_begin});
#pragma omp single copyprivate(partials)
    {
      memory.resize(parts * partial_size);
      partials = memory.data();
    }
  }
  deal(tasks.size(), [&](int64_t i) {
    Attention<T, M> attention(p, tasks[i], tasks[std::min(i + 1, (int64_t)tasks.size() - 1)], scratch);
    if (whole.empty()) {
      attention.run(scratch.total);
      attention.write(scratch.total);
    } else {
      attention.run(state_at(partials + tasks[i].partial * partial_size, most_rows, padded));
    }
  });
  if (whole.empty()) return;
  deal(whole.size(), [&](int64_t i) {
    const Task& task = whole[i];
    const auto partial = [&](int n) {
      return state_at(partials + (task.partial + n) * partial_size, most_rows, padded);
    };
    for (int n = 1; n < task.part_end - task.part_begin; ++n)
      merge(partial(0), partial(n), task.count * p.group(), padded);
    Attention<T, M>(p, task, task, scratch).write(partial(0));
  });
}

}  // namespace

struct AttentionCall {
  void* out;
  const void *q, *kv;
  const int32_t *tables, *query_starts, *context_lens;
  int requests, heads, kv_heads, dim, block_size;
  int64_t q_stride, block_stride, table_stride;
  int window;  // 0 is off, of softcap too
  float scale, softcap;
  int dtype;
};

SHOAL_KERNEL(attention, AttentionCall) {
  const Problem problem{(const char*)a.q, (const char*)a.kv, (char*)a.out,   a.tables,       a.query_starts,
                        a.context_lens,   a.q_stride,        a.block_stride, a.table_stride, a.heads,
                        a.kv_heads,       a.dim,             a.block_size,   a.window,       a.scale,
                        a.softcap,        (a.block_size + kLanes - 1) / kLanes};
  with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, BFloat16>)
      if (kv_pack<T>(a.dim, a.block_size) == 2) return attend<T, PairMath>(problem, a.requests);
    attend<T, SingleMath<T>>(problem, a.requests);
  });
}

}  // namespace shoal
