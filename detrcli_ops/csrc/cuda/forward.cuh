// One sweep over the samples; of key-aware attention with a running softmax.
#pragma once

#include "rows.cuh"

namespace detrcli_ops {
namespace {

template <class T, int LANES, int V, int C, bool KDA>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Problem p, T* out) {
  using G = Group<T, LANES, V, C>;
  using Row = typename G::Row;
  using A = typename G::A;
  constexpr int groups = kThreads / LANES;
  const int m = blockIdx.y, group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int64_t b = blockIdx.z;
  const G g{p, b, m, lane};
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t found = query_of(p, tile, group, groups);
    const int64_t query = b * p.queries + (found < 0 ? 0 : found), head = query * p.heads + m;
    Row sum;
    sum.zero();
    A poison;
    if constexpr (KDA) {
      Row q;
      q.load(static_cast<const T*>(p.query.data) + head * p.depth, lane, p.depth);
      Running<A> softmax;
      poison = g.each(query, head, [](int) { return A(0); }, [&](int, const Sample<A>& s, bool, const Sample<A>&) {
        Row row[4];
        g.corners(p.value, s, row);
        const Row v = g.blend(s, row);
        Row k = v;
        if (p.key) {
          g.corners(p.key, s, row);
          k = g.blend(s, row);
        }
        A weight;
        sum.scale(softmax.take(group_sum<LANES>(q.dot(k)) * static_cast<A>(p.scale), weight));
        sum.add(weight, v);
      });
      sum.scale(1 / softmax.total, poison);
    } else {
      A peak = 0, total = 1;
      if (p.softmax) softmax_parts<LANES>(p, head, lane, peak, total);
      const auto attention = [&](int j) {
        const A w = get<A>(p.weights, head * p.samples() + j);
        return p.softmax ? exp(w - peak) / total : w;
      };
      poison = g.each(query, head, attention, [&](int, const Sample<A>& s, bool, const Sample<A>&) {
        Row row[4];
        g.corners(p.value, s, row);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.add(s.attention * s.share(k), row[k]);
      });
      sum.scale(1, poison);
    }
    if (found >= 0) sum.store(out + head * p.depth, lane, p.depth);
  }
}

}  // namespace
}  // namespace detrcli_ops
