// Vectors of one instruction set, by the compiler's vector extension: one source for SSE, AVX2, AVX-512 and NEON.
// DETRCLI_OPS_VECTOR_BYTES is the register width of the translation unit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace detrcli_ops {
namespace {

constexpr int kBytes = DETRCLI_OPS_VECTOR_BYTES;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int N = kBytes / 4;
  typedef float F __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
};

template <>
struct Lanes<double> {
  static constexpr int N = kBytes / 8;
  typedef double F __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes / 2)));
};

typedef uint8_t U8 __attribute__((vector_size(kBytes / 4)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef Lanes<float>::F F32;
typedef Lanes<double>::F F64;

template <class A>
using Float = typename Lanes<A>::F;
template <class A>
using Int = typename Lanes<A>::I;

template <class V, class T>
inline V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store_as(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <class A>
inline Float<A> splat(A a) {
  return Float<A>{} + a;
}

// load: one vector of the working type from any element type.
inline F32 load(const float* from) { return load_as<F32>(from); }
inline F64 load(const double* from) { return load_as<F64>(from); }
#if DETRCLI_OPS_VECTOR_BYTES == 64
inline F32 load(const uint8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_as<__m128i>(from))); }
inline F32 load(const bf16* from) { return F32(U32(_mm512_cvtepu16_epi32(load_as<__m256i>(from))) << 16); }
inline F32 load(const f16* from) { return _mm512_cvtph_ps(load_as<__m256i>(from)); }
#elif DETRCLI_OPS_VECTOR_BYTES == 32
inline F32 load(const uint8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(from))); }
inline F32 load(const bf16* from) { return F32(U32(_mm256_cvtepu16_epi32(load_as<__m128i>(from))) << 16); }
inline F32 load(const f16* from) { return _mm256_cvtph_ps(load_as<__m128i>(from)); }
#else
inline F32 load(const uint8_t* from) { return __builtin_convertvector(load_as<U8>(from), F32); }
inline F32 load(const bf16* from) { return F32(__builtin_convertvector(load_as<U16>(from), U32) << 16); }
inline F32 load(const f16* from) {
  const U32 h = __builtin_convertvector(load_as<U16>(from), U32);
  const U32 magnitude = h & 0x7fff;
  const F32 finite = F32(magnitude << 13) * 0x1p112f;
  const U32 bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : U32(finite);
  return F32(bits | (h & 0x8000) << 16);
}
#endif

inline void store(float* to, F32 v) { store_as(to, v); }
inline void store(double* to, F64 v) { store_as(to, v); }
inline void store(bf16* to, F32 v) {
  const U32 u = U32(v);
  const U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  store_as(to, __builtin_convertvector(v == v ? rounded : U32{} + 0x7fc0, U16));
}
#if DETRCLI_OPS_VECTOR_BYTES == 64
inline void store(f16* to, F32 v) { store_as(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#elif DETRCLI_OPS_VECTOR_BYTES == 32
inline void store(f16* to, F32 v) { store_as(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
// Bits of the nearest float16, in the low half of each lane; no type, which GCC has from 12 on (x86) or 13 (ARM).
inline void store(f16* to, F32 v) {
  const U32 u = U32(v), magnitude = u & 0x7fffffff;
  const U32 normal = (magnitude - 0x37fff001 + ((u >> 13) & 1)) >> 13;  // exponent from 127 to 15, half of the last bit up
  const U32 small = U32(F32(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds to multiples of float16's least number
  const U32 large = magnitude > 0x7f800000 ? U32{} + 0x7e00 : U32{} + 0x7c00;
  const U32 finite = magnitude < 0x38800000 ? small : normal;
  const U32 bits = magnitude >= 0x477ff000 ? large : finite;
  store_as(to, __builtin_convertvector(bits | (u & 0x80000000) >> 16, U16));
}
#endif

// stream: past the caches, to an aligned address; others see it after `streamed`.
#if DETRCLI_OPS_VECTOR_BYTES == 64
inline void stream(float* to, F32 v) { _mm512_stream_ps(to, v); }
#elif DETRCLI_OPS_VECTOR_BYTES == 32
inline void stream(float* to, F32 v) { _mm256_stream_ps(to, v); }
#elif defined(__x86_64__)
inline void stream(float* to, F32 v) { _mm_stream_ps(to, v); }
#else
inline void stream(float* to, F32 v) { store(to, v); }
#endif

inline void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Fewer elements than lanes, by branches that are always foreseen instead of a call.
template <int lanes, class E>
inline void copy_some(E* to, const E* from, int64_t n) {
#pragma GCC unroll 4
  for (int chunk = lanes / 2; chunk; chunk /= 2) {
    if (!(n & chunk)) continue;
    std::memcpy(to, from, chunk * sizeof(E));
    to += chunk;
    from += chunk;
  }
}

// The first n lanes only; the others read as zero and are not written.
template <class A, class E>
inline Float<A> load_some(const E* from, int64_t n) {
#if DETRCLI_OPS_VECTOR_BYTES == 64
  const unsigned lanes = (1u << n) - 1;
  if constexpr (std::is_same_v<E, float>) return _mm512_maskz_loadu_ps(lanes, from);
  if constexpr (std::is_same_v<E, bf16>) return F32(U32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from))) << 16);
  if constexpr (std::is_same_v<E, f16>) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
#elif DETRCLI_OPS_VECTOR_BYTES == 32
  const Int<float> lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  if constexpr (std::is_same_v<E, float>) return _mm256_maskload_ps(from, __m256i(lanes < static_cast<int32_t>(n)));
#endif
  E some[Lanes<A>::N] = {};
  copy_some<Lanes<A>::N>(some, from, n);
  return load(some);
}

template <class A, class E>
inline void store_some(E* to, Float<A> v, int64_t n) {
  E some[Lanes<A>::N];
  store(some, v);
  copy_some<Lanes<A>::N>(to, some, n);
}

typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));

// Four lanes of two vectors, counted through both.
template <int i, int j, int k, int l>
inline F32x4 pick(F32x4 a, F32x4 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else  // GCC has the other one too, from 12 on
  return __builtin_shuffle(a, b, I32x4{i, j, k, l});
#endif
}

// Halve by an operation until four lanes are left.
#if DETRCLI_OPS_VECTOR_BYTES == 64
template <class Op>
inline F32x4 fold(F32 v, Op op) {
  const __m256 half = op(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return op(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#elif DETRCLI_OPS_VECTOR_BYTES == 32
template <class Op>
inline F32x4 fold(F32 v, Op op) {
  return op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#else
template <class Op>
inline F32x4 fold(F32 v, Op) {
  return v;
}
#endif

struct Add {
  template <class V>
  V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

inline float sum(F32 v) {
  const F32x4 s = fold(v, Add{});
  return (s[0] + s[1]) + (s[2] + s[3]);
}
inline double sum(F64 v) {
  double total = 0;
  for (int i = 0; i < Lanes<double>::N; ++i) total += v[i];
  return total;
}

inline float largest(F32 v) {
  const F32x4 m = fold(v, Larger{});
  const Larger larger;
  return larger(larger(m[0], m[1]), larger(m[2], m[3]));
}
inline double largest(F64 v) {
  double most = v[0];
  for (int i = 1; i < Lanes<double>::N; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// to[i] += sum(v[i]), four sums at once: the transposed sum costs less than four horizontal ones.
inline void add_sums(float* to, const F32 v[4]) {
  const F32x4 a = fold(v[0], Add{}), b = fold(v[1], Add{}), c = fold(v[2], Add{}), d = fold(v[3], Add{});
  const F32x4 ab = pick<0, 4, 1, 5>(a, b) + pick<2, 6, 3, 7>(a, b);
  const F32x4 cd = pick<0, 4, 1, 5>(c, d) + pick<2, 6, 3, 7>(c, d);
  const F32x4 sums = pick<0, 1, 4, 5>(ab, cd) + pick<2, 3, 6, 7>(ab, cd);
  store_as(to, load_as<F32x4>(to) + sums);
}

inline void add_sums(double* to, const F64 v[4]) {
  for (int i = 0; i < 4; ++i) to[i] += sum(v[i]);
}

// exp to about 2 ulp for float: 2^n * p(r), |r| <= ln(2)/2. Zero below -87; NaN stays NaN.
inline F32 exp(F32 x) {
  const F32 high = splat(88.0f), low = splat(-87.0f);
  const F32 bounded = x > high ? high : (x < low ? low : x);
  const F32 shifter = splat(0x1.8p23f);
  const F32 n = (bounded * 0x1.715476p0f + shifter) - shifter;
  const F32 r = (bounded - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  F32 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const F32 whole = n == n ? n : F32{};
  const F32 power = F32((__builtin_convertvector(whole, Lanes<float>::I) + 127) << 23);
  return x < low ? F32{} : p * power;
}

inline F64 exp(F64 x) {
  for (int i = 0; i < Lanes<double>::N; ++i) x[i] = ::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace detrcli_ops
