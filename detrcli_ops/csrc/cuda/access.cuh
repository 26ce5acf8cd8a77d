// Elements and 16-byte words of arrays, widened to the working type and back.
#pragma once

#include "problem.cuh"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstring>
#include <type_traits>

namespace detrcli_ops {
namespace {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(double x) { return static_cast<T>(x); }
template <class T>
__device__ inline T narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return static_cast<T>(x);
  }
}

template <class A>
__device__ inline A get(const Array& array, int64_t i) {
  if constexpr (std::is_same_v<A, double>) {
    return static_cast<const double*>(array.data)[i];
  } else {
    if (array.dtype == Dtype::bf16) return widen(static_cast<const __nv_bfloat16*>(array.data)[i]);
    if (array.dtype == Dtype::f16) return widen(static_cast<const __half*>(array.data)[i]);
    return static_cast<const float*>(array.data)[i];
  }
}

template <class A>
__device__ inline void put(const Array& array, int64_t i, A x) {
  if constexpr (std::is_same_v<A, double>) {
    static_cast<double*>(array.data)[i] = x;
  } else {
    if (array.dtype == Dtype::bf16) {
      static_cast<__nv_bfloat16*>(array.data)[i] = __float2bfloat16(x);
    } else if (array.dtype == Dtype::f16) {
      static_cast<__half*>(array.data)[i] = __float2half(x);
    } else {
      static_cast<float*>(array.data)[i] = x;
    }
  }
}

// V elements, by one 16-byte load where V fills it.
template <class A, class T, int V>
__device__ inline void load_row(const T* from, A (&to)[V]) {
  if constexpr (V * sizeof(T) == 16) {
    const uint4 word = __ldg(reinterpret_cast<const uint4*>(from));
    T parts[V];
    memcpy(parts, &word, 16);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen(parts[v]);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen(__ldg(from + v));
  }
}

template <class A, class T, int V>
__device__ inline void store_row(T* to, const A (&from)[V]) {
  if constexpr (V * sizeof(T) == 16) {
    T parts[V];
#pragma unroll
    for (int v = 0; v < V; ++v) parts[v] = narrow<T>(from[v]);
    uint4 word;
    memcpy(&word, parts, 16);
    *reinterpret_cast<uint4*>(to) = word;
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = narrow<T>(from[v]);
  }
}

}  // namespace
}  // namespace detrcli_ops
