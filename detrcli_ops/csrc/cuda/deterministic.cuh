// Sums in whole numbers, which do not depend on their order.
#pragma once

#include "backward.cuh"

namespace detrcli_ops {
namespace {

// The largest finite number outside padding, `per_token` numbers an element of the mask. Padding is never added, and what is
// not finite is seen where it is added: neither may spoil the bound.
template <class A>
__global__ void largest_kernel(Array array, int64_t count, const bool* mask, int64_t per_token, unsigned long long* most) {
  A largest = 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    if (mask && mask[i / per_token]) continue;
    const A x = fabs(get<A>(array, i));
    if (x > largest && x < A(INFINITY)) largest = x;
  }
  // the order of non-negative numbers is that of their bits
  atomicMax(most, static_cast<unsigned long long>(__double_as_longlong(largest)));
}

// The bound, from the largest of [gradient, weights, value, query] combined as the addends combine them.
__global__ void bound_kernel(const double* most, bool kda, bool softmax, bool shared, int depth, double scale, FixedPoint* fixed) {
  const double grad = most[0], weight = softmax || kda ? 1 : most[1];
  const double by_key = kda ? 2 * fabs(scale) * depth * grad * most[2] * most[3] : 0;
  const double bound = shared ? grad + by_key : fmax(grad * weight, by_key);
  fixed->lost = bound < INFINITY ? 0 : 1;
  fixed->bound = bound < INFINITY ? bound : 1;
}

template <class T>
__global__ void unfix_kernel(const __grid_constant__ Problem p, const long long* from, T* to, int64_t count, const FixedPoint* fixed) {
  const double scale = fixed_scale(p, fixed->bound);
  const bool finite = fixed->lost == 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    to[i] = narrow<T>(finite ? static_cast<A>(static_cast<double>(from[i]) / scale) : static_cast<A>(NAN));
  }
}

}  // namespace
}  // namespace detrcli_ops
