// The samples of a query and head: where they lie, which corners they touch, and how much each counts.
#pragma once

#include "access.h"

namespace detrcli_ops {
namespace {

// The samples of one query and head (or of a few queries, in one level), as arrays over samples.
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

template <class A>
void describe_level(Samples<A>& s, int64_t from, int64_t count, int64_t height, int64_t width, int64_t start) {
  for (int64_t i = from; i < from + count; ++i) {
    s.width[i] = static_cast<A>(width);
    s.height[i] = static_cast<A>(height);
    s.columns[i] = static_cast<int32_t>(width);
    s.lines[i] = static_cast<int32_t>(height);
    s.start[i] = static_cast<int32_t>(start);
    s.base_x[i] = s.base_y[i] = A(-0.5);
    s.step_x[i] = static_cast<A>(width);
    s.step_y[i] = static_cast<A>(height);
  }
}

template <class A>
void describe_levels(Samples<A>& s, const Problem& p) {
  int64_t start = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    describe_level(s, l * p.points, p.points, height, width, start);
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

// Where offsets of one query count from and in which unit, in pixels of the level; returns 0, or NaN where that is not finite.
template <class A>
inline A anchor(Samples<A>& s, int64_t from, int64_t count, A height, A width, const A* reference, int64_t reference_width,
                int64_t points) {
  fill(s.base_x + from, count, reference[0] * width - A(0.5));
  fill(s.base_y + from, count, reference[1] * height - A(0.5));
  const bool box = reference_width == 4;
  const A unit = A(0.5) / static_cast<A>(points);
  fill(s.step_x + from, count, box ? reference[2] * unit * width : A(1));
  fill(s.step_y + from, count, box ? reference[3] * unit * height : A(1));
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
  // lanes beyond the last sample are swept in fours with the others: they must point at zeros
  for (int64_t i = s.count; i % 4; ++i) s.row[0][i] = s.row[1][i] = s.row[2][i] = s.row[3][i] = outside;
  return sum(poison);
}

template <class A>
void leave_padding(Samples<A>& s, const bool* mask, int32_t outside) {
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = 0; i < s.count; ++i) {
      if (s.row[k][i] != outside && mask[s.row[k][i]]) s.row[k][i] = outside;
    }
  }
}

// Softmax over the samples, in place; lanes beyond the last sample become 0.
template <class A>
void softmax(A* logits, int64_t count) {
  const A lowest = A(-INFINITY);
  const int64_t end = padded(count);
  for (int64_t i = count; i < end; ++i) logits[i] = lowest;
  Float<A> most = splat(lowest);
  for (int64_t i = 0; i < end; i += Lanes<A>::N) {
    const Float<A> v = load(logits + i);
    most = v > most ? v : most;
  }
  const Float<A> peak = splat(largest(most));
  Float<A> total{};
  for (int64_t i = 0; i < end; i += Lanes<A>::N) {
    const Float<A> e = exp(load(logits + i) - peak);
    total += e;
    store(logits + i, e);
  }
  const Float<A> share = splat(A(1) / sum(total));
  for (int64_t i = 0; i < end; i += Lanes<A>::N) store(logits + i, load(logits + i) * share);
}

}  // namespace
}  // namespace detrcli_ops
