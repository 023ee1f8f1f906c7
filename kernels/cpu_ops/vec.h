// Sixteen 32-bit lanes through the compilers' vector extension, so that one source serves AVX-512, AVX2, NEON and
// plain C++; intrinsics only where the extension has no word for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shoal {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define SHOAL_INLINE inline __attribute__((always_inline))
#define SHOAL_EXPORT extern "C" __attribute__((visibility("default")))

// The compilers' own type for float16, for CPUs without the intrinsics below.
#if defined(__aarch64__)
typedef __fp16 NativeHalf;
#elif !defined(__F16C__)
typedef _Float16 NativeHalf;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SHOAL_INLINE Vec splat(float x) { return Vec{} + x; }
SHOAL_INLINE Words splat_word(uint32_t x) { return Words{} + x; }

template <class V, class P>
SHOAL_INLINE V load_raw(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class P>
SHOAL_INLINE void store_raw(P* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

SHOAL_INLINE Vec as_vec(Words w) { return (Vec)w; }
#if defined(__AVX512F__)
// GCC splits __builtin_convertvector of this width in two.
SHOAL_INLINE Words widen(Halves h) { return (Words)_mm512_cvtepu16_epi32((__m256i)h); }
SHOAL_INLINE Halves narrow(Words w) { return (Halves)_mm512_cvtepi32_epi16((__m512i)w); }
#else
SHOAL_INLINE Words widen(Halves h) { return __builtin_convertvector(h, Words); }
SHOAL_INLINE Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }
#endif

SHOAL_INLINE Vec to_float(const float* p) { return load_raw<Vec>(p); }
SHOAL_INLINE Vec to_float(const BFloat16* p) { return as_vec(widen(load_raw<Halves>(p)) << 16); }
SHOAL_INLINE Vec to_float(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
  return load_raw<Vec>(halves);
#else
  NativeHalf half[kLanes];
  std::memcpy(half, p, sizeof(half));
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = (float)half[i];
  return v;
#endif
}

SHOAL_INLINE void from_float(float* p, Vec v) { store_raw(p, v); }
// Round to nearest even; NaN keeps being NaN.
SHOAL_INLINE void from_float(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  store_raw(p, _mm512_cvtneps_pbh((__m512)v));
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words is_nan = (Words)(v != v);
  store_raw(p, narrow((rounded & ~is_nan) | (is_nan & 0x7fc0u)));
#endif
}
SHOAL_INLINE void from_float(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof(v));
  for (int i = 0; i < 2; ++i) _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph(halves[i], _MM_FROUND_TO_NEAREST_INT));
#else
  NativeHalf half[kLanes];
  for (int i = 0; i < kLanes; ++i) half[i] = (NativeHalf)v[i];
  std::memcpy(p, half, sizeof(half));
#endif
}

// The first n lanes; the others read as 0.
template <class T>
SHOAL_INLINE Vec load(const T* p, int n = kLanes) {
  if (n >= kLanes) return to_float(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return to_float(lanes);
}

template <class T>
SHOAL_INLINE void store(T* p, Vec v, int n = kLanes) {
  if (n >= kLanes) return from_float(p, v);
  T lanes[kLanes];
  from_float(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// sum + a * b in every lane, of which a and b hold two bfloat16 numbers each.
SHOAL_INLINE Vec multiply_add_pairs(Vec sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const Words high = splat_word(0xffff0000u);
  return as_vec(a & high) * as_vec(b & high) + (as_vec(a << 16) * as_vec(b << 16) + sum);
#endif
}

SHOAL_INLINE Vec select(Ints condition, Vec yes, Vec no) {
  return (Vec)(((Ints)yes & condition) | ((Ints)no & ~condition));
}
#if defined(__AVX512F__)
SHOAL_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
SHOAL_INLINE Vec minimum(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
SHOAL_INLINE Vec maximum(Vec a, Vec b) { return select(a > b, a, b); }
SHOAL_INLINE Vec minimum(Vec a, Vec b) { return select(a < b, a, b); }
#endif

// Fixed order, so that a sum does not depend on the batch around it.
SHOAL_INLINE float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
SHOAL_INLINE float max_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// exp(x) within 2 units in the last place: 2^n * polynomial(r), r in +-ln(2)/2. Exactly 1 at 0, 0 below -87.3 (-inf too),
// saturating above 88.3.
SHOAL_INLINE Vec exp(Vec x) {
  const Ints is_zero = x < splat(-87.3f);
  x = minimum(maximum(x, splat(-87.3f)), splat(88.3f));
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Ints exponent = (Ints)shifted << 23;
  return select(is_zero, Vec{}, (Vec)((Ints)y + exponent));
}

// 2^x for x <= 0, within 2 units in the last place. Exactly 1 at 0, 0 below -126 or so (-inf too).
SHOAL_INLINE Vec exp2_nonpositive(Vec x) {
#if defined(__AVX512F__)
  x = maximum(x, splat(-200.0f));
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Ints is_zero = x < splat(-126.0f);
  x = maximum(x, splat(-126.0f));
  const Vec n = (x + 12582912.0f) - 12582912.0f;
#endif
  const Vec r = x - n;
  Vec y = splat(1.535920892e-4f);
  y = y * r + 1.339262701e-3f;
  y = y * r + 9.618384764e-3f;
  y = y * r + 5.550347269e-2f;
  y = y * r + 2.402264476e-1f;
  y = y * r + 6.931471825e-1f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const Ints exponent = __builtin_convertvector(n, Ints) << 23;
  return select(is_zero, Vec{}, (Vec)((Ints)y + exponent));
#endif
}

SHOAL_INLINE Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

template <class Body>
SHOAL_INLINE void for_lanes(int n, Body body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// Calls body with a null pointer of the element type that a dtype code of library.py stands for.
template <class Body>
inline void with_dtype(int dtype, Body body) {
  if (dtype == 0) body((float*)nullptr);
  if (dtype == 1) body((BFloat16*)nullptr);
  if (dtype == 2) body((Float16*)nullptr);
}

}  // namespace shoal
