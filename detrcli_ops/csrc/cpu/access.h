// Memory of a worker, and elements of any dtype as the working type.
#pragma once

#include "problem.h"
#include "vector.h"

namespace detrcli_ops {
namespace {

constexpr int kPad = 16;       // samples are padded to whole vectors of any width
constexpr int64_t kAhead = 4;  // queries between the prefetch of an input and its use

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* start = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t{63});
    next_ = reinterpret_cast<char*>(start + count);
    return start;
  }

 private:
  char* next_;
};

// Calls f with a null pointer of the element type: the dtype as a type.
template <class A, class F>
inline void with_type(Dtype dtype, F f) {
  if constexpr (sizeof(A) == 8) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == Dtype::bf16) {
    f(static_cast<bf16*>(nullptr));
  } else if (dtype == Dtype::f16) {
    f(static_cast<f16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

template <class E>
inline E* at(const Array& array, int64_t index) {
  return static_cast<E*>(array.data) + index;
}

// Inlined by force, and so are those who only prefetch: GCC takes such a function for one without effect and drops its calls.
#define DETRCLI_OPS_INLINE __attribute__((always_inline)) inline

DETRCLI_OPS_INLINE void prefetch(const Array& array, int64_t index, int64_t count) {
  const int64_t size = array.dtype == Dtype::f64 ? 8 : array.dtype == Dtype::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(array.data) + index * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i);
}

// Copies elements; one of the two types is the working type.
template <class A, class To, class From>
inline void put(To* to, int64_t count, const From* from) {
  int64_t i = 0;
  for (; i + Lanes<A>::N <= count; i += Lanes<A>::N) store(to + i, load(from + i));
  if constexpr (std::is_same_v<To, From>) {
    for (; i < count; ++i) to[i] = from[i];
  } else if (i < count) {
    store_some<A>(to + i, load_some<A>(from + i, count - i), count - i);
  }
}

template <class A>
void read(const Array& array, int64_t index, int64_t count, A* to) {
  with_type<A>(array.dtype, [&](auto* type) { put<A>(to, count, at<std::remove_pointer_t<decltype(type)>>(array, index)); });
}

template <class A>
void write(const Array& array, int64_t index, int64_t count, const A* from) {
  with_type<A>(array.dtype, [&](auto* type) { put<A>(at<std::remove_pointer_t<decltype(type)>>(array, index), count, from); });
}

// The elements themselves where they have the working type, else a converted copy.
template <class A>
const A* view(const Array& array, int64_t index, int64_t count, A* copy) {
  if (array.dtype == (sizeof(A) == 8 ? Dtype::f64 : Dtype::f32)) return at<A>(array, index);
  read(array, index, count, copy);
  return copy;
}

}  // namespace
}  // namespace detrcli_ops
