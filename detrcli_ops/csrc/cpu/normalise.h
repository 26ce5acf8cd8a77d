// Bytes of pictures as floats. A batch is larger than any cache and is read much later, so the numbers go past the caches: a
// store through them would first read from memory what it is about to overwrite.
#pragma once

#include "vector.h"

namespace detrcli_ops {
namespace {

inline bool whole_register_fits(const float* to) { return reinterpret_cast<uintptr_t>(to) % kBytes == 0; }

// to[i] = from[i] * scale[i] + shift[i] for the first `count` numbers, 0 for the rest of `room`.
inline void normalise_row(const uint8_t* from, const float* scale, const float* shift, int64_t count, float* to, int64_t room) {
  constexpr int64_t N = Lanes<float>::N;
  int64_t i = 0;
  const auto one = [&] {
    to[i] = i < count ? from[i] * scale[i] + shift[i] : 0;
    ++i;
  };
  while (i < room && !whole_register_fits(to + i)) one();
  for (; i + N <= count; i += N) stream(to + i, load(from + i) * load(scale + i) + load(shift + i));
  while (i < room && (i < count || !whole_register_fits(to + i))) one();
  for (; i + N <= room; i += N) stream(to + i, F32{});
  while (i < room) one();
}

}  // namespace
}  // namespace detrcli_ops
