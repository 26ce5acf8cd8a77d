// The channels of a lane: sums over corners, dots with them, softmax on the way.
#pragma once

#include "samples.cuh"

namespace detrcli_ops {
namespace {

// The channels of one lane: C words of V, LANES words apart.
template <class T, int LANES, int V, int C>
struct Channels {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  A x[C][V];

  __device__ void zero() {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[c][v] = 0;
    }
  }
  __device__ void load(const T* row, int lane, int depth) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int channel = (c * LANES + lane) * V;
      if (channel < depth) {
        load_row<A, T, V>(row + channel, x[c]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) x[c][v] = 0;
      }
    }
  }
  __device__ void store(T* row, int lane, int depth) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int channel = (c * LANES + lane) * V;
      if (channel < depth) store_row<A, T, V>(row + channel, x[c]);
    }
  }
  __device__ void add(A share, const Channels& other) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[c][v] += share * other.x[c][v];
    }
  }
  __device__ void scale(A by, A plus = 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[c][v] = x[c][v] * by + plus;
    }
  }
  __device__ A dot(const Channels& other) const {
    A total = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) total += x[c][v] * other.x[c][v];
    }
    return total;
  }
};

// What a group of lanes works on: one query and head.
template <class T, int LANES, int V, int C>
struct Group {
  using Row = Channels<T, LANES, V, C>;
  using A = typename Row::A;
  const Problem& p;
  int64_t b;
  int m, lane;

  __device__ const T* row_of(const Array& rows, const Sample<A>& s, int k) const {
    const Level& level = p.level[s.level];
    const int64_t token = b * p.tokens + level.start + s.token(k, level.width);
    return static_cast<const T*>(rows.data) + (token * p.heads + m) * p.depth;
  }
  // The four corners; zeros outside.
  __device__ void corners(const Array& rows, const Sample<A>& s, Row (&row)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      row[k].zero();
      if (s.inside >> k & 1) row[k].load(row_of(rows, s, k), lane, p.depth);
    }
  }
  __device__ Row blend(const Sample<A>& s, const Row (&row)[4]) const {
    Row sampled;
    sampled.zero();
#pragma unroll
    for (int k = 0; k < 4; ++k) sampled.add(s.share(k), row[k]);
    return sampled;
  }
  __device__ void dots(const Row& with, const Row (&row)[4], A (&d)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) d[k] = group_sum<LANES>(with.dot(row[k]));
  }
  // Locates all samples, LANES at a time, and calls f(index, sample, owner) for each on all lanes; the owner keeps `own`.
  template <class W, class F>
  __device__ A each(int64_t query, int64_t head, W attention, F f) const {
    A poison = 0;
    const int samples = p.samples();
    for (int first = 0; first < samples; first += LANES) {
      Sample<A> own{};
      const int j = first + lane;
      if (j < samples) {
        own = locate<A>(p, b, query, head, j, poison);
        own.attention = attention(j);
      }
      const int count = samples - first < LANES ? samples - first : LANES;
      for (int i = 0; i < count; ++i) f(first + i, from_lane<LANES>(own, i), i == lane, own);
    }
    return group_sum<LANES>(poison);
  }
};

// Running softmax: weights of samples seen so far are kept relative to the largest logit.
template <class A>
struct Running {
  A peak = A(-INFINITY), total = 0;
  // Takes a logit; returns what to multiply earlier sums by, and the weight of this one.
  __device__ A take(A logit, A& weight) {
    const A before = peak;
    peak = larger(logit, peak);
    const A shrink = before == A(-INFINITY) ? A(0) : exp(before - peak);
    weight = peak == A(-INFINITY) ? A(0) : exp(logit - peak);
    total = total * shrink + weight;
    return shrink;
  }
};

}  // namespace
}  // namespace detrcli_ops
