// The gradient by the rows: who owns the cells adds to them, without atomics.
#pragma once

#include "sweep.h"

namespace detrcli_ops {
namespace {

constexpr int64_t kGroup = 64;  // samples located together when scattering

// Adds the gradients of some levels of one image and head, queries in order: each cell's sum does not depend on how levels
// are shared out. Blocks of queries go through all levels while what they hold is in cache.
template <class A>
struct Scatterer {
  const Problem& p;
  const Scatter& g;
  int64_t b, m, samples, together;
  Samples<A> s;
  A *row, *share, *second_share, *dump, *cells;

  Scatterer(const Problem& p, const Scatter& g, int64_t b, int64_t m, Arena arena)
      : p(p),
        g(g),
        b(b),
        m(m),
        samples(p.levels * p.points),
        together(kGroup > p.points ? kGroup / p.points : 1),
        s(arena, together * p.points) {
    row = arena.take<A>(2 * padded(p.depth));
    share = arena.take<A>(s.room);
    second_share = arena.take<A>(s.room);
    dump = arena.take<A>(padded(p.depth));  // what falls outside is added here and never read
    cells = arena.take<A>(0);
    std::memset(dump, 0, padded(p.depth) * sizeof(A));
  }

  int64_t head(int64_t q) const { return (b * p.queries + q) * p.heads + m; }
  int64_t size(int64_t level) const { return p.shapes[2 * level] * p.shapes[2 * level + 1]; }

  void run(int64_t first_level, int64_t last_level) {
    int64_t skipped = 0, used = 0;
    for (int64_t l = 0; l < first_level; ++l) skipped += size(l);
    for (int64_t l = first_level; l < last_level; ++l) used += size(l);
    if (!g.direct) std::memset(cells, 0, used * p.depth * sizeof(A));
    for (int64_t block = 0; block < p.queries; block += kQueryBlock) {
      const int64_t end = block + kQueryBlock < p.queries ? block + kQueryBlock : p.queries;
      int64_t start = skipped;
      for (int64_t l = first_level; l < last_level; ++l) {
        if (size(l)) {
          describe_level(s, 0, together * p.points, p.shapes[2 * l], p.shapes[2 * l + 1], 0);
          for (int64_t q = block; q < end; q += together) add(l, start, start - skipped, q, q + together < end ? q + together : end);
        }
        start += size(l);
      }
    }
    for (int64_t cell = 0; cell < used && !g.direct; ++cell) {
      write(g.target, target_of(skipped + cell), p.depth, cells + cell * p.depth);
    }
  }

  int64_t target_of(int64_t token) const { return ((b * p.tokens + token) * p.heads + m) * p.depth; }

  // Reads and locates the samples of a few queries in one level.
  void place(int64_t level, int64_t start, int64_t first, int64_t last) {
    s.count = (last - first) * p.points;
    for (int64_t q = first; q < last; ++q) {
      const int64_t i = (q - first) * p.points, sample = head(q) * samples + level * p.points;
      if (q + kQueryBlock < p.queries) {
        const int64_t ahead = head(q + kQueryBlock);
        prefetch(p.locations, 2 * (ahead * samples + level * p.points), 1);
        prefetch(g.share, ahead * samples + level * p.points, 1);
      }
      read_pairs(p.locations, 2 * sample, p.points, s.x + i, s.y + i);
      if (p.reference) {
        A copy[4 + Lanes<A>::N];
        const int64_t at = ((b * p.queries + q) * p.levels + level) * p.reference_width;
        anchor(s, i, p.points, static_cast<A>(p.shapes[2 * level]), static_cast<A>(p.shapes[2 * level + 1]),
               view(p.reference, at, p.reference_width, copy), p.reference_width, p.points);
      }
      read(g.share, sample, p.points, share + i);
      if (g.second_source) read(g.second_share, sample, p.points, second_share + i);
    }
    const int32_t outside = static_cast<int32_t>(size(level));
    locate(s, outside);
    if (p.mask) leave_padding(s, p.mask + b * p.tokens + start, outside);
  }

  void add(int64_t level, int64_t start, int64_t first_cell, int64_t first, int64_t last) {
    place(level, start, first, last);
    A* base = g.direct ? at<A>(g.target, target_of(start)) : cells + first_cell * p.depth;
    for (int64_t q = first; q < last; ++q) {
      if (q + kAhead < p.queries) prefetch(g.source, head(q + kAhead) * p.depth, p.depth);
      const A* source = view(g.source, head(q) * p.depth, p.depth, row);
      const int64_t from = (q - first) * p.points;
      if (g.second_source) {
        const A* second = view(g.second_source, head(q) * p.depth, p.depth, row + padded(p.depth));
        deposit(base, static_cast<int32_t>(size(level)), from, source, second, std::true_type{});
      } else {
        deposit(base, static_cast<int32_t>(size(level)), from, source, source, std::false_type{});
      }
    }
  }

  // Adds one query's samples, from the one at `from` on, to their cells.
  template <bool both>
  void deposit(A* base, int32_t outside, int64_t from, const A* source, const A* second,
               std::integral_constant<bool, both>) {
    const int64_t stride = g.direct ? p.heads * p.depth : p.depth;
    for_blocks<A>(p.depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      Float<A> one[R], two[R];
      for (int v = 0; v < R; ++v) {
        one[v] = load_block<A, V>(source + c + v * N, some);
        if constexpr (both) two[v] = load_block<A, V>(second + c + v * N, some);
      }
      const A *const first_shares = share, *const second_shares = second_share;
      const int32_t* const rows[4] = {s.row[0], s.row[1], s.row[2], s.row[3]};
      const A* const corners[4] = {s.corner[0], s.corner[1], s.corner[2], s.corner[3]};
      A *const cells = base + c, *const nowhere = dump + c;
      const int64_t end = from + p.points;
      for (int64_t i = from; i < end; ++i) {
        Float<A> add[R];
        for (int v = 0; v < R; ++v) {
          add[v] = first_shares[i] * one[v];
          if constexpr (both) add[v] += second_shares[i] * two[v];
        }
        for (int k = 0; k < 4; ++k) {
          A* to = rows[k][i] == outside ? nowhere : cells + rows[k][i] * stride;
          const A w = corners[k][i];
          if constexpr (V == 0) {  // one by one: a wide read would wait for the narrow write to the same cell before it
            A parts[N];
            store(parts, w * add[0]);
            for (int64_t j = 0; j < some; ++j) to[j] += parts[j];
          } else {
            for (int v = 0; v < R; ++v) store(to + v * N, load(to + v * N) + w * add[v]);
          }
        }
      }
    });
  }
};

template <class A>
size_t scatter_room(const Problem& p, bool direct) {
  const int64_t group = kGroup > p.points ? kGroup : p.points, room = padded(group) + kPad;
  const int64_t cells = direct ? 0 : p.tokens;
  return samples_bytes<A>(group) + (3 * padded(p.depth) + 2 * room + cells * p.depth) * sizeof(A) + 16 * 64;
}

}  // namespace
}  // namespace detrcli_ops
