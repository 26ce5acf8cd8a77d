// Sums in whole numbers, which do not depend on their order.
#pragma once

#include "backward.cuh"

namespace detrcli_ops {
namespace {

__global__ void largest_kernel(Array array, int64_t count, unsigned* most) {
  float largest = 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const float x = array.dtype == Dtype::f64 ? static_cast<float>(fabs(get<double>(array, i))) : fabsf(get<float>(array, i));
    largest = larger(x, largest);
  }
  // the order of non-negative floats is that of their bits, and NaN is above all
  atomicMax(most, __float_as_uint(largest));
}

// bound = largest of [gradient, weights, value, query] combined as the addends combine them.
__global__ void bound_kernel(const float* most, bool kda, bool softmax, bool shared, int depth, float scale, float* bound) {
  const float grad = most[0], weight = softmax || kda ? 1 : most[1];
  const float by_key = kda ? 2 * fabsf(scale) * depth * grad * most[2] * most[3] : 0;
  *bound = shared ? grad + by_key : larger(grad * weight, by_key);
  if (!(*bound < INFINITY)) *bound = NAN;
}

template <class T>
__global__ void unfix_kernel(const __grid_constant__ Problem p, const long long* from, T* to, int64_t count, const float* bound) {
  const double scale = fixed_scale(p, *bound);
  const bool finite = *bound == *bound;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    to[i] = narrow<T>(finite ? static_cast<A>(static_cast<double>(from[i]) / scale) : static_cast<A>(NAN));
  }
}

}  // namespace
}  // namespace detrcli_ops
