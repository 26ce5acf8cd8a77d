// Gradients of geometry in the group that owns the query; those of rows added in shared memory or by atomics.
#pragma once

#include "rows.cuh"

namespace detrcli_ops {
namespace {

// Fixed point for the deterministic mode: integer sums do not depend on their order.
__device__ inline double fixed_scale(const Problem& p, double bound) {
  const double addends = static_cast<double>(p.queries) * p.samples() * 4;
  return bound > 0 ? exp2(fmin(floor(61 - log2(addends) - log2(bound)), 1000.0)) : 1;
}

template <class T, int LANES, int V, int C>
struct Scatter {
  using G = Group<T, LANES, V, C>;
  using Row = typename G::Row;
  using A = typename G::A;
  const G& g;
  const Outputs& o;
  A* shared;
  double scale;  // of the fixed point, 0 in the default mode

  // target += share * row at one corner of a sample.
  __device__ void add(const Array& target, const Sample<A>& s, int k, A share, const Row& row) const {
    const Problem& p = g.p;
    const Level& level = p.level[s.level];
    const int token = s.token(k, level.width);
    const int64_t at = ((g.b * p.tokens + level.start + token) * p.heads + g.m) * p.depth;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int channel = (c * LANES + g.lane) * V;
      if (channel >= p.depth) continue;
      if (scale != 0) {
        auto* to = static_cast<unsigned long long*>(target.data) + at + channel;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const double addend = static_cast<double>(share * row.x[c][v]);
          if (!isfinite(addend)) o.fixed->lost = 1;  // whole numbers have no NaN; all who write it write the same
          atomicAdd(to + v, static_cast<unsigned long long>(__double2ll_rn(addend * scale)));
        }
        continue;
      }
      const bool near = shared && level.shared >= 0;
      A* to = near ? shared + level.shared + token * p.depth + channel : static_cast<A*>(target.data) + at + channel;
      add_word(to, share, row.x[c], near);
    }
  }

  static __device__ void add_word(A* to, A share, const A (&x)[V], bool near) {
#if __CUDA_ARCH__ >= 900
    if constexpr (std::is_same_v<A, float> && V % 4 == 0) {
      if (!near) {
#pragma unroll
        for (int v = 0; v < V; v += 4) {
          atomicAdd(reinterpret_cast<float4*>(to + v),
                    make_float4(share * x[v], share * x[v + 1], share * x[v + 2], share * x[v + 3]));
        }
        return;
      }
    }
#endif
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(to + v, share * x[v]);
  }
};

// Adds what a block gathered of its small levels to the whole: one head and image, one addition a cell.
template <class A>
__device__ void flush(const Problem& p, const Array& target, const A* shared, int64_t b, int m) {
  __syncthreads();
  for (int l = 0; l < p.levels; ++l) {
    const Level& level = p.level[l];
    if (level.shared < 0) continue;
    for (int i = threadIdx.x; i < level.height * level.width * p.depth; i += kThreads) {
      const A x = shared[level.shared + i];
      const int64_t token = b * p.tokens + level.start + i / p.depth;
      if (x != 0) atomicAdd(static_cast<A*>(target.data) + (token * p.heads + m) * p.depth + i % p.depth, x);
    }
  }
}

template <class T, int LANES, int V, int C, bool KDA>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Outputs o) {
  using G = Group<T, LANES, V, C>;
  using Row = typename G::Row;
  using A = typename G::A;
  extern __shared__ __align__(16) char memory[];
  A* shared = o.shared_elements ? reinterpret_cast<A*>(memory) : nullptr;
  for (int i = threadIdx.x; i < o.shared_elements; i += kThreads) shared[i] = 0;
  __syncthreads();

  constexpr int groups = kThreads / LANES;
  const int m = blockIdx.y, group = threadIdx.x / LANES, lane = threadIdx.x % LANES, samples = p.samples();
  const int64_t b = blockIdx.z;
  const G g{p, b, m, lane};
  const Scatter<T, LANES, V, C> scatter{g, o, shared, o.fixed ? fixed_scale(p, o.fixed->bound) : 0.0};

  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t found = query_of(p, tile, group, groups);
    const bool live = found >= 0;
    const int64_t query = b * p.queries + (live ? found : 0), head = query * p.heads + m, first = head * samples;
    Row grad;
    grad.load(static_cast<const T*>(o.grad.data) + head * p.depth, lane, p.depth);
    const auto write_location = [&](int j, const Sample<A>& own, A x, A y) {
      if (o.pixels) {
        put(o.pixels, (first + j) * 2, x);
        put(o.pixels, (first + j) * 2 + 1, y);
      }
      if (o.locations) {
        put(o.locations, (first + j) * 2, times(x, own.step_x));
        put(o.locations, (first + j) * 2 + 1, times(y, own.step_y));
      }
    };

    if constexpr (KDA) {
      Row q, d_query;
      q.load(static_cast<const T*>(p.query.data) + head * p.depth, lane, p.depth);
      d_query.zero();
      const A scale = static_cast<A>(p.scale);
      const auto no_attention = [](int) { return A(0); };
      // first sweep: softmax, and the mean gradient by it; nothing of size samples x channels is ever stored
      Running<A> softmax;
      A mean = 0;
      g.each(query, head, no_attention, [&](int, const Sample<A>& s, bool, const Sample<A>&) {
        Row row[4];
        g.corners(p.value, s, row);
        const Row v = g.blend(s, row);
        Row k = v;
        if (p.key) {
          g.corners(p.key, s, row);
          k = g.blend(s, row);
        }
        A weight;
        const A shrink = softmax.take(group_sum<LANES>(q.dot(k)) * scale, weight);
        mean = mean * shrink + weight * group_sum<LANES>(grad.dot(v));
      });
      mean /= softmax.total;
      g.each(query, head, no_attention, [&](int j, const Sample<A>& s, bool owner, const Sample<A>& own) {
        Row row[4];
        A dv[4], dk[4];
        g.corners(p.value, s, row);
        g.dots(grad, row, dv);
        if (p.key) g.corners(p.key, s, row);
        g.dots(q, row, dk);
        A logit = 0, by_weight = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          logit += s.share(k) * dk[k];
          by_weight += s.share(k) * dv[k];
        }
        const A attention = exp(logit * scale - softmax.peak) / softmax.total;
        const A by_key = attention * (by_weight - mean) * scale;
        d_query.add(by_key, g.blend(s, row));
        if (owner && live) {
          write_location(j, own, attention * s.slope_x(dv) + by_key * s.slope_x(dk),
                         attention * s.slope_y(dv) + by_key * s.slope_y(dk));
        }
        if (!o.value || !live) return;
        Row both = grad;
        both.scale(attention);
        if (!p.key) both.add(by_key, q);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (!(s.inside >> k & 1)) continue;
          scatter.add(o.value, s, k, s.share(k), both);
          if (p.key) scatter.add(o.key, s, k, s.share(k) * by_key, q);
        }
      });
      if (o.query && live) d_query.store(static_cast<T*>(o.query.data) + head * p.depth, lane, p.depth);
    } else {
      A peak = 0, total = 1, mean = 0;
      if (p.softmax) softmax_parts<LANES>(p, head, lane, peak, total);
      const auto attention = [&](int j) {
        const A w = get<A>(p.weights, first + j);
        return p.softmax ? exp(w - peak) / total : w;
      };
      g.each(query, head, attention, [&](int j, const Sample<A>& s, bool owner, const Sample<A>& own) {
        Row row[4];
        A d[4];
        g.corners(p.value, s, row);
        g.dots(grad, row, d);
        A by_weight = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) by_weight += s.share(k) * d[k];
        mean += s.attention * by_weight;
        if (owner && live) {
          write_location(j, own, s.attention * s.slope_x(d), s.attention * s.slope_y(d));
          if (o.raw) put(o.raw, first + j, by_weight);
          if (o.weights && !p.softmax) put(o.weights, first + j, by_weight);
        }
        if (!o.value || !live) return;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (s.inside >> k & 1) scatter.add(o.value, s, k, s.attention * s.share(k), grad);
        }
      });
      if (p.softmax && o.weights && live) {  // each lane reads back only what it wrote itself
        for (int j = lane; j < samples; j += LANES) {
          put(o.weights, first + j, attention(j) * (get<A>(o.raw, first + j) - mean));
        }
      }
    }
  }
  if (shared) flush(p, o.value, shared, b, m);
}

// The gradient by reference points and boxes: one thread a query and level, heads and points in a fixed order.
template <class A>
__global__ void reference_kernel(const __grid_constant__ Problem p, Array pixels, Array to) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= p.batch * p.queries * p.levels) return;
  const int64_t query = i / p.levels;
  const int l = static_cast<int>(i % p.levels);
  const A unit = A(0.5) / static_cast<A>(p.points);
  A total[4] = {};
  for (int m = 0; m < p.heads; ++m) {
    for (int j = 0; j < p.points; ++j) {
      const int64_t at = ((query * p.heads + m) * p.samples() + l * p.points + j) * 2;
      const A x = get<A>(pixels, at), y = get<A>(pixels, at + 1);
      total[0] += x;
      total[1] += y;
      total[2] += times(x, get<A>(p.locations, at)) * unit;
      total[3] += times(y, get<A>(p.locations, at + 1)) * unit;
    }
  }
  for (int k = 0; k < p.reference_width; ++k) {
    put(to, i * p.reference_width + k, total[k] * static_cast<A>(k % 2 ? p.level[l].height : p.level[l].width));
  }
}

}  // namespace
}  // namespace detrcli_ops
