// The gradient by the rows: who owns the cells adds to them, without atomics.
#pragma once

#include "sweep.h"

namespace detrcli_ops {
namespace {

constexpr int64_t kGroup = 64;  // samples located together when scattering

// The gradient of some rows of one image and head while it is added up: in place, or in a buffer where they lie together.
template <class A>
struct RowSums {
  const Problem& p;
  const Target& to;
  int64_t b, m, first, count;  // tokens
  A *nowhere, *cells;          // what falls outside is added to `nowhere`, which is never read

  RowSums(const Problem& p, const Target& to, int64_t b, int64_t m, int64_t first, int64_t count, Arena& arena)
      : p(p), to(to), b(b), m(m), first(first), count(count) {
    nowhere = arena.take<A>(padded(p.depth));
    cells = arena.take<A>(0);
    std::memset(nowhere, 0, padded(p.depth) * sizeof(A));
    if (!to.direct) std::memset(cells, 0, count * p.depth * sizeof(A));
  }

  int64_t target(int64_t token) const { return ((b * p.tokens + token) * p.heads + m) * p.depth; }
  int64_t stride() const { return to.direct ? p.heads * p.depth : p.depth; }
  A* row(int64_t token) const { return to.direct ? at<A>(to.rows, target(token)) : cells + (token - first) * p.depth; }

  void finish() const {
    if (to.direct) return;
    with_type<A>(to.rows.dtype, [&](auto* type) {
      auto* const rows = at<std::remove_pointer_t<decltype(type)>>(to.rows, 0);
      for (int64_t cell = 0; cell < count; ++cell) put<A>(rows + target(first + cell), p.depth, cells + cell * p.depth);
    });
  }

  static size_t bytes(const Problem& p, bool direct) {
    return (padded(p.depth) + (direct ? 0 : p.tokens * p.depth)) * sizeof(A) + 2 * 64;
  }
};

// What a query gives to the rows under each of its samples: share * source.
template <class A>
struct Gift {
  const A *share, *source;
};

// Adds what a query gives, once or twice, to the corners of its samples first..last. Rows count from the token `start`.
template <class A, class... Gifts>
void deposit(const RowSums<A>& sums, const Samples<A>& s, int64_t first, int64_t last, int64_t start, int32_t outside, Gifts... gifts) {
  constexpr int G = sizeof...(Gifts);
  const int64_t stride = sums.stride();
  A *const base = sums.row(start), *const nowhere = sums.nowhere;
  const Gift<A> given[G] = {gifts...};
  const int32_t* const rows[4] = {s.row[0], s.row[1], s.row[2], s.row[3]};
  const A* const corners[4] = {s.corner[0], s.corner[1], s.corner[2], s.corner[3]};
  const auto cell = [&](int64_t i, int k, int64_t c) { return (rows[k][i] == outside ? nowhere : base + rows[k][i] * stride) + c; };
  for_blocks<A>(sums.p.depth, [&](int64_t c, auto vectors, int64_t some) {
    constexpr int V = vectors, N = Lanes<A>::N;
    if constexpr (V == 0) {  // one by one: a wide read would wait for the narrow write to the same cell before it
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = 0; j < some; ++j) {
          A add = given[0].share[i] * given[0].source[c + j];
          if constexpr (G == 2) add += given[1].share[i] * given[1].source[c + j];
          for (int k = 0; k < 4; ++k) cell(i, k, c)[j] += corners[k][i] * add;
        }
      }
    } else {
      const A* shares[G];
      Float<A> source[G][V];
      for (int j = 0; j < G; ++j) {
        shares[j] = given[j].share;
        for (int v = 0; v < V; ++v) source[j][v] = load(given[j].source + c + v * N);
      }
      for (int64_t i = first; i < last; ++i) {
        Float<A> add[V];
        for (int v = 0; v < V; ++v) {
          add[v] = shares[0][i] * source[0][v];
          if constexpr (G == 2) add[v] += shares[1][i] * source[1][v];
        }
        for (int k = 0; k < 4; ++k) {
          A* const to = cell(i, k, c);
          const A w = corners[k][i];
          for (int v = 0; v < V; ++v) store(to + v * N, load(to + v * N) + w * add[v]);
        }
      }
    }
  });
}

// Adds the gradients of some levels of one image and head, queries in order: each cell's sum does not depend on how levels
// are shared out. Blocks of queries go through all levels while what they hold is in cache.
template <class A>
struct Scatterer {
  const Problem& p;
  const Scatter& g;
  int64_t b, m, samples, together;
  Arena arena;
  Samples<A> s;
  A *row, *share, *second_share;

  Scatterer(const Problem& p, const Scatter& g, int64_t b, int64_t m, void* scratch)
      : p(p),
        g(g),
        b(b),
        m(m),
        samples(p.levels * p.points),
        together(kGroup > p.points ? kGroup / p.points : 1),
        arena(scratch),
        s(arena, together * p.points) {
    row = arena.take<A>(2 * padded(p.depth));
    share = arena.take<A>(s.room);
    second_share = arena.take<A>(s.room);
  }

  int64_t head(int64_t q) const { return (b * p.queries + q) * p.heads + m; }
  int64_t size(int64_t level) const { return p.shapes[2 * level] * p.shapes[2 * level + 1]; }

  void run(int64_t first_level, int64_t last_level) {
    int64_t skipped = 0, used = 0;
    for (int64_t l = 0; l < first_level; ++l) skipped += size(l);
    for (int64_t l = first_level; l < last_level; ++l) used += size(l);
    const RowSums<A> sums(p, g.to, b, m, skipped, used, arena);
    for (int64_t block = 0; block < p.queries; block += kQueryBlock) {
      const int64_t end = block + kQueryBlock < p.queries ? block + kQueryBlock : p.queries;
      int64_t start = skipped;
      for (int64_t l = first_level; l < last_level; ++l) {
        if (size(l)) {
          describe_level(s, 0, together * p.points, p.shapes[2 * l], p.shapes[2 * l + 1], 0, p.kind != Kind::msda);
          for (int64_t q = block; q < end; q += together) add(sums, l, start, q, q + together < end ? q + together : end);
        }
        start += size(l);
      }
    }
    sums.finish();
  }

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
    if (p.mask) leave_padding(s, 0, s.count, p.mask + b * p.tokens + start, outside);
  }

  void add(const RowSums<A>& sums, int64_t level, int64_t start, int64_t first, int64_t last) {
    place(level, start, first, last);
    const int32_t outside = static_cast<int32_t>(size(level));
    for (int64_t q = first; q < last; ++q) {
      if (q + kAhead < p.queries) prefetch(g.source, head(q + kAhead) * p.depth, p.depth);
      const Gift<A> gift{share, view(g.source, head(q) * p.depth, p.depth, row)};
      const int64_t from = (q - first) * p.points, to = from + p.points;
      if (g.second_source) {
        const Gift<A> second{second_share, view(g.second_source, head(q) * p.depth, p.depth, row + padded(p.depth))};
        deposit(sums, s, from, to, start, outside, gift, second);
      } else {
        deposit(sums, s, from, to, start, outside, gift);
      }
    }
  }
};

template <class A>
size_t scatter_room(const Problem& p, bool direct) {
  const int64_t group = kGroup > p.points ? kGroup : p.points, room = padded(group) + kPad;
  return samples_bytes<A>(group) + (2 * padded(p.depth) + 2 * room) * sizeof(A) + 14 * 64 + RowSums<A>::bytes(p, direct);
}

}  // namespace
}  // namespace detrcli_ops
