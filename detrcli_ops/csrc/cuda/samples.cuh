// Where samples lie and how much each counts; computed by one lane, handed round by shuffles.
#pragma once

#include "lanes.cuh"

namespace detrcli_ops {
namespace {

// One sample. Corners: 0 upper left, 1 upper right, 2 lower left, 3 lower right; bit k of `inside` allows corner k.
template <class A>
struct Sample {
  int row;  // token of the upper left corner, in its level
  int level;
  unsigned inside;
  A fx, fy, attention, step_x, step_y;

  __device__ A share(int k) const { return (k & 1 ? fx : 1 - fx) * (k & 2 ? fy : 1 - fy); }
  __device__ int token(int k, int width) const { return row + (k & 1) + (k & 2 ? width : 0); }
  __device__ A slope_x(const A* d) const { return (d[1] - d[0]) * (1 - fy) + (d[3] - d[2]) * fy; }
  __device__ A slope_y(const A* d) const { return (d[2] - d[0]) * (1 - fx) + (d[3] - d[1]) * fx; }
};

// gradient * factor, and 0 where there is no gradient: what a sample outside is multiplied with may be NaN or infinite.
template <class A>
__device__ A times(A gradient, A factor) {
  return gradient == 0 ? 0 : gradient * factor;
}

// The sample j of a head of a query. A location that is not finite counts as outside and makes `poison` NaN; it is asked as
// read, for in pixels a finite one may overflow.
template <class A>
__device__ Sample<A> locate(const Problem& p, int64_t b, int64_t query, int64_t head, int j, A& poison) {
  Sample<A> s{};
  s.level = j / p.points;
  const Level& level = p.level[s.level];
  const int64_t at = (head * p.samples() + j) * 2;
  A x = get<A>(p.locations, at), y = get<A>(p.locations, at + 1);
  poison += x * A(0) + y * A(0);
  A base_x = A(-0.5), base_y = A(-0.5);
  s.step_x = static_cast<A>(level.width);
  s.step_y = static_cast<A>(level.height);
  if (p.reference) {
    const int64_t ref = (query * p.levels + s.level) * p.reference_width;
    for (int k = 0; k < p.reference_width; ++k) poison += get<A>(p.reference, ref + k) * A(0);
    base_x = get<A>(p.reference, ref) * level.width - A(0.5);
    base_y = get<A>(p.reference, ref + 1) * level.height - A(0.5);
    const A unit = A(0.5) / static_cast<A>(p.points);
    s.step_x = p.reference_width == 4 ? get<A>(p.reference, ref + 2) * unit * level.width : A(1);
    s.step_y = p.reference_width == 4 ? get<A>(p.reference, ref + 3) * unit * level.height : A(1);
  }
  x = base_x + s.step_x * x;
  y = base_y + s.step_y * y;
  x = x > A(-2) ? x : A(-2);  // NaN too
  y = y > A(-2) ? y : A(-2);
  x = x < A(level.width + 1) ? x : A(level.width + 1);
  y = y < A(level.height + 1) ? y : A(level.height + 1);
  const A left = floor(x), top = floor(y);
  s.fx = x - left;
  s.fy = y - top;
  const int column = static_cast<int>(left), line = static_cast<int>(top);
  s.row = line * level.width + column;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int cx = column + (k & 1), cy = line + (k >> 1);
    bool inside = cx >= 0 && cx < level.width && cy >= 0 && cy < level.height;
    if (inside && p.mask) inside = !p.mask[b * p.tokens + level.start + s.token(k, level.width)];
    s.inside |= static_cast<unsigned>(inside) << k;
  }
  return s;
}

template <int LANES, class A>
__device__ inline Sample<A> from_lane(const Sample<A>& s, int lane) {
  Sample<A> t;
  t.row = __shfl_sync(kAll, s.row, lane, LANES);
  t.level = __shfl_sync(kAll, s.level, lane, LANES);
  t.inside = __shfl_sync(kAll, s.inside, lane, LANES);
  t.fx = __shfl_sync(kAll, s.fx, lane, LANES);
  t.fy = __shfl_sync(kAll, s.fy, lane, LANES);
  t.attention = __shfl_sync(kAll, s.attention, lane, LANES);
  t.step_x = t.step_y = 0;  // stay with the lane that located the sample
  return t;
}

// Peak and total of a softmax over the samples' logits; lanes share the work.
template <int LANES, class A>
__device__ void softmax_parts(const Problem& p, int64_t head, int lane, A& peak, A& total) {
  peak = A(-INFINITY);
  for (int j = lane; j < p.samples(); j += LANES) peak = larger(get<A>(p.weights, head * p.samples() + j), peak);
  peak = group_max<LANES>(peak);
  total = 0;
  for (int j = lane; j < p.samples(); j += LANES) total += exp(get<A>(p.weights, head * p.samples() + j) - peak);
  total = group_sum<LANES>(total);
}

}  // namespace
}  // namespace detrcli_ops
