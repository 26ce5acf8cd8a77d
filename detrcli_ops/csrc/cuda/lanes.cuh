// Lanes of a warp that serve one query and head together, and the queries that a block walks.
#pragma once

#include "access.cuh"

namespace detrcli_ops {
namespace {

template <int LANES, class A>
__device__ inline A group_sum(A x) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(kAll, x, step, LANES);
  return x;
}

// NaN wins: a softmax over NaN answers NaN.
template <class A>
__device__ inline A larger(A a, A b) { return (a > b || a != a) ? a : b; }

template <int LANES, class A>
__device__ inline A group_max(A x) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(kAll, x, step, LANES));
  return x;
}

// The query that a group serves in a tile; -1 beyond the last one.
__device__ inline int64_t query_of(const Problem& p, int64_t tile, int group, int groups) {
  if (!p.grid) {
    const int64_t q = tile * groups + group;
    return q < p.queries ? q : -1;
  }
  const int across = groups < 8 ? groups : 8, down = groups / across;
  for (int l = 0; l < p.levels; ++l) {
    const Level& level = p.level[l];
    const int64_t columns = (level.width + across - 1) / across, lines = (level.height + down - 1) / down;
    if (tile < columns * lines) {
      const int64_t x = tile % columns * across + group % across, y = tile / columns * down + group / across;
      return x < level.width && y < level.height ? level.start + y * level.width + x : -1;
    }
    tile -= columns * lines;
  }
  return -1;
}

int64_t tiles_of(const Problem& p, int groups) {
  if (!p.grid) return (p.queries + groups - 1) / groups;
  const int across = groups < 8 ? groups : 8, down = groups / across;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; ++l) {
    tiles += int64_t{(p.level[l].width + across - 1) / across} * ((p.level[l].height + down - 1) / down);
  }
  return tiles;
}

}  // namespace
}  // namespace detrcli_ops
