// The samples of a query and head: where they lie, which corners they touch, and how much each counts.
#pragma once

#include "access.h"

namespace detrcli_ops {
namespace {

// The samples of a few queries and one head (of all levels or of one), as arrays over samples.
template <class A>
struct Samples {
  int64_t count, room;
  A *x, *y, *weight;            // as read: coordinates, attention
  A *base_x, *base_y, *step_x, *step_y;  // pixel = base + step * coordinate
  A *width, *height;            // of the sample's level
  int32_t *columns, *lines, *start;
  A *fx, *fy;                   // distance to the upper left corner
  A* corner[4];                 // bilinear shares: upper left, upper right, lower left, lower right
  int32_t* row[4];              // token of each corner; `outside` where there is none

  Samples(Arena& arena, int64_t count) : count(count), room(padded(count) + kPad) {
    A** reals[] = {&x,     &y,      &weight, &base_x, &base_y,    &step_x,    &step_y,   &width,
                   &height, &fx,     &fy,     &corner[0], &corner[1], &corner[2], &corner[3]};
    int32_t** integers[] = {&columns, &lines, &start, &row[0], &row[1], &row[2], &row[3]};
    for (A** array : reals) {
      *array = arena.take<A>(room);
      std::memset(*array, 0, room * sizeof(A));
    }
    for (int32_t** array : integers) {
      *array = arena.take<int32_t>(room);
      std::memset(*array, 0, room * sizeof(int32_t));
    }
  }
};

template <class A>
size_t samples_bytes(int64_t count) {
  return (padded(count) + kPad) * (15 * sizeof(A) + 7 * sizeof(int32_t)) + 22 * 64;
}

// Samples in one level, by locations in its picture or by offsets in its pixels.
template <class A>
void describe_level(Samples<A>& s, int64_t from, int64_t count, int64_t height, int64_t width, int64_t start, bool offsets) {
  for (int64_t i = from; i < from + count; ++i) {
    s.width[i] = static_cast<A>(width);
    s.height[i] = static_cast<A>(height);
    s.columns[i] = static_cast<int32_t>(width);
    s.lines[i] = static_cast<int32_t>(height);
    s.start[i] = static_cast<int32_t>(start);
    s.base_x[i] = s.base_y[i] = A(-0.5);
    s.step_x[i] = offsets ? A(1) : static_cast<A>(width);
    s.step_y[i] = offsets ? A(1) : static_cast<A>(height);
  }
}

// All levels, for a query whose samples begin at `first`.
template <class A>
void describe_levels(Samples<A>& s, int64_t first, const Problem& p) {
  int64_t start = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    describe_level(s, first + l * p.points, p.points, height, width, start, p.kind != Kind::msda);
    start += height * width;
  }
}

// gradient * factor, and 0 where there is no gradient: what a sample outside is multiplied with may be NaN or infinite.
template <class A>
inline A times(A gradient, A factor) {
  return gradient == 0 ? 0 : gradient * factor;
}

template <class A>
inline void fill(A* to, int64_t count, A value) {  // up to 3 elements beyond, which the room allows for
  for (int64_t i = 0; i < count; i += 4) to[i] = to[i + 1] = to[i + 2] = to[i + 3] = value;
}

// Where offsets of one query count from, in pixels of the level, and with a box in which unit; returns 0, or NaN where that is
// not finite.
template <class A>
inline A anchor(Samples<A>& s, int64_t from, int64_t count, A height, A width, const A* reference, int64_t reference_width,
                int64_t points) {
  fill(s.base_x + from, count, reference[0] * width - A(0.5));
  fill(s.base_y + from, count, reference[1] * height - A(0.5));
  if (reference_width == 4) {
    const A unit = A(0.5) / static_cast<A>(points);
    fill(s.step_x + from, count, reference[2] * unit * width);
    fill(s.step_y + from, count, reference[3] * unit * height);
  }
  A poison = 0;
  for (int64_t k = 0; k < reference_width; ++k) poison += reference[k] * A(0);
  return poison;
}

template <class A>
inline void read_pairs(const Array& array, int64_t index, int64_t count, A* x, A* y) {
  with_type<A>(array.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* from = at<E>(array, index);
    if constexpr (sizeof(E) == 2) {
      A pair[2 * Lanes<A>::N];
      for (int64_t i = 0; i < count; i += Lanes<A>::N) {
        const int64_t n = 2 * (count - i) < 2 * Lanes<A>::N ? 2 * (count - i) : 2 * Lanes<A>::N;
        E some[2 * Lanes<A>::N];
        std::memcpy(some, from + 2 * i, n * sizeof(E));
        std::memset(some + n, 0, (2 * Lanes<A>::N - n) * sizeof(E));
        store(pair, load(some));
        store(pair + Lanes<A>::N, load(some + Lanes<A>::N));
        for (int k = 0; k < Lanes<A>::N; ++k) {
          x[i + k] = pair[2 * k];
          y[i + k] = pair[2 * k + 1];
        }
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        x[i] = from[2 * i];
        y[i] = from[2 * i + 1];
      }
    }
  });
}

// Fills corners and rows; returns 0, or NaN where a coordinate is not finite: as read, for in pixels a finite one may overflow.
template <class A>
A locate(Samples<A>& s, int32_t outside) {
  using F = Float<A>;
  using I = Int<A>;
  F poison{};
  const F low = splat(A(-2));
  const I none = I{} + outside, nothing{};
  for (int64_t i = 0; i < s.count; i += Lanes<A>::N) {
    const F width = load(s.width + i), height = load(s.height + i);
    F x = load(s.x + i), y = load(s.y + i);
    poison += x * A(0) + y * A(0);
    x = load(s.base_x + i) + load(s.step_x + i) * x;
    y = load(s.base_y + i) + load(s.step_y + i) * y;
    x = x > low ? x : low;  // NaN too
    y = y > low ? y : low;
    x = x < width + A(1) ? x : width + A(1);
    y = y < height + A(1) ? y : height + A(1);
    F left = __builtin_convertvector(__builtin_convertvector(x, I), F);
    F top = __builtin_convertvector(__builtin_convertvector(y, I), F);
    left -= left > x ? splat(A(1)) : F{};
    top -= top > y ? splat(A(1)) : F{};
    const F fx = x - left, fy = y - top;
    store(s.fx + i, fx);
    store(s.fy + i, fy);
    store(s.corner[0] + i, (A(1) - fx) * (A(1) - fy));
    store(s.corner[1] + i, fx * (A(1) - fy));
    store(s.corner[2] + i, (A(1) - fx) * fy);
    store(s.corner[3] + i, fx * fy);
    const I column = __builtin_convertvector(left, I), line = __builtin_convertvector(top, I);
    const I columns = load_as<I>(s.columns + i), lines = load_as<I>(s.lines + i);
    const I in_left = (column >= nothing) & (column < columns), in_right = (column >= -1) & (column < columns - 1);
    const I in_top = (line >= nothing) & (line < lines), in_bottom = (line >= -1) & (line < lines - 1);
    const I row = load_as<I>(s.start + i) + line * columns + column;
    store_as(s.row[0] + i, in_left & in_top ? row : none);
    store_as(s.row[1] + i, in_right & in_top ? row + 1 : none);
    store_as(s.row[2] + i, in_left & in_bottom ? row + columns : none);
    store_as(s.row[3] + i, in_right & in_bottom ? row + columns + 1 : none);
  }
  return sum(poison);
}

// Sends corners of the samples first..last that lie on padding outside.
template <class A>
void leave_padding(Samples<A>& s, int64_t first, int64_t last, const bool* mask, int32_t outside) {
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = first; i < last; ++i) {
      if (s.row[k][i] != outside && mask[s.row[k][i]]) s.row[k][i] = outside;
    }
  }
}

// A vector of which at least the first n lanes are read.
template <class A>
inline Float<A> load_first(const A* from, int64_t n) {
  return n < Lanes<A>::N ? load_some<A>(from, n) : load(from);
}

// The first n lanes of v, and `other` in those beyond.
template <class A>
inline Float<A> first_of(int64_t n, Float<A> v, A other) {
  Float<A> lane;
  for (int k = 0; k < Lanes<A>::N; ++k) lane[k] = static_cast<A>(k);
  return lane < static_cast<A>(n) ? v : splat(other);
}

template <class A>
A dot(const A* a, const A* b, int64_t count) {
  Float<A> total{};
  for (int64_t i = 0; i < count; i += Lanes<A>::N) total += load_first(a + i, count - i) * load_first(b + i, count - i);
  return sum(total);
}

// Softmax of scale * logits; whole vectors are written, with 0 in the lanes beyond the last logit.
template <class A>
void softmax(const A* logits, A scale, int64_t count, A* to) {
  constexpr int N = Lanes<A>::N;
  Float<A> most = splat(A(-INFINITY));
  for (int64_t i = 0; i < count; i += N) {
    const Float<A> v = first_of(count - i, scale * load_first(logits + i, count - i), A(-INFINITY));
    store(to + i, v);
    most = v > most ? v : most;
  }
  const Float<A> peak = splat(largest(most));
  Float<A> total{};
  for (int64_t i = 0; i < count; i += N) {
    const Float<A> e = exp(load(to + i) - peak);
    total += e;
    store(to + i, e);
  }
  const Float<A> share = splat(A(1) / sum(total));
  for (int64_t i = 0; i < count; i += N) store(to + i, load(to + i) * share);
}

// Several softmaxes, of `count` logits each, in the lanes of one vector; `owner` says for each lane which one it belongs to.
template <class A>
void softmax_in_lanes(const A* logits, A scale, const A* owner, int64_t softmaxes, int64_t count, A* to) {
  const Float<A> whose = load(owner), v = scale * load(logits);
  store(to, v);
  Float<A> peak{}, total = splat(A(1));
  for (int64_t i = 0; i < softmaxes; ++i) {
    const A* own = to + i * count;
    A most = own[0];
    for (int64_t j = 1; j < count; ++j) most = own[j] > most ? own[j] : most;
    peak = whose == static_cast<A>(i) ? splat(most) : peak;
  }
  const Float<A> e = exp(v - peak);
  store(to, e);
  for (int64_t i = 0; i < softmaxes; ++i) {
    const A* own = to + i * count;
    A all = own[0];
    for (int64_t j = 1; j < count; ++j) all += own[j];
    total = whose == static_cast<A>(i) ? splat(all) : total;
  }
  store(to, e / total);
}

}  // namespace
}  // namespace detrcli_ops
