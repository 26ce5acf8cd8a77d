// Loops over the corners of samples, in vectors over channels: weighted sums, dots, sampled rows.
#pragma once

#include "samples.h"

namespace detrcli_ops {
namespace {

// The rows of one image and head.
template <class E>
struct Table {
  const E* base;
  int64_t stride;
  const E* zeros;  // the row for `outside`
  int32_t outside;
  bool packed;     // zeros lie at their place in the table
};

// Some of the samples: those of one query.
struct Range {
  int64_t first, count;
};

// The corners of samples in a table, from a first channel on. A copy of what the innermost loops need: what they read
// through references is read again after every store.
template <class A, class E, bool packed>
struct Corners {
  const E *base, *zeros;
  int64_t stride;
  int32_t outside;
  const int32_t* rows[4];
  const A* shares[4];

  Corners(const Samples<A>& s, int64_t first, A* const share[4], const Table<E>& table, int64_t channel)
      : base(table.base + channel), zeros(table.zeros + channel), stride(table.stride), outside(table.outside),
        rows{s.row[0] + first, s.row[1] + first, s.row[2] + first, s.row[3] + first},
        shares{share[0] + first, share[1] + first, share[2] + first, share[3] + first} {}

  const E* row(int64_t sample, int corner) const {
    const int32_t token = rows[corner][sample];
    return !packed && token == outside ? zeros : base + token * stride;
  }
  A share(int64_t sample, int corner) const { return shares[corner][sample]; }
};

// Calls f(channel -> Corners) with the kind of table as a type.
template <class A, class E, class F>
inline void with_corners(const Samples<A>& s, int64_t first, A* const share[4], const Table<E>& table, F f) {
  if (table.packed) {
    f([&](int64_t channel) { return Corners<A, E, true>(s, first, share, table, channel); });
  } else {
    f([&](int64_t channel) { return Corners<A, E, false>(s, first, share, table, channel); });
  }
}

constexpr int64_t kNarrow = 2;  // channels that are taken one by one: of a vector for them most lanes would be empty

// Calls f(first channel, vectors, lanes of a last partial vector or 0), widest blocks first.
template <class A, class F>
inline void for_blocks(int64_t depth, F f) {
  constexpr int N = Lanes<A>::N;
  int64_t c = 0;
  for (; c + 4 * N <= depth; c += 4 * N) f(c, std::integral_constant<int, 4>{}, 0);
  for (; c + 2 * N <= depth; c += 2 * N) f(c, std::integral_constant<int, 2>{}, 0);
  for (; c + N <= depth; c += N) f(c, std::integral_constant<int, 1>{}, 0);
  if (c < depth) f(c, std::integral_constant<int, 0>{}, depth - c);
}

template <class A, int V, class E>
inline Float<A> load_block(const E* from, int64_t some) {
  if constexpr (V == 0) return load_some<A>(from, some);
  return load(from);
}

template <class A, int V, class E>
inline void store_block(E* to, Float<A> v, int64_t some) {
  if constexpr (V == 0) {
    store_some<A>(to, v, some);
  } else {
    store(to, v);
  }
}

// out = sum of share * row over samples and corners, + poison.
template <class A, class E, class O>
void sweep(const Samples<A>& s, Range part, A* const share[4], const Table<E>& table, int64_t depth, O* out, A poison) {
  with_corners(s, part.first, share, table, [&](auto corners) {
    for_blocks<A>(depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      constexpr int chains = R <= 2 ? 4 : 2;  // independent sums, to hide the latency of the additions
      const auto from = corners(c);
      const int64_t count = part.count;
      if constexpr (V == 0 && std::is_same_v<A, E>) {
        for (int64_t j = 0; j < some && some <= kNarrow; ++j) {
          A sums[4] = {};
          for (int64_t i = 0; i < count; ++i) {
            for (int k = 0; k < 4; ++k) sums[k] += from.share(i, k) * from.row(i, k)[j];
          }
          const A total = sums[0] + sums[1] + (sums[2] + sums[3]) + poison;
          put<A>(out + c + j, 1, &total);
        }
        if (some <= kNarrow) return;
      }
      Float<A> acc[chains][R] = {};
      for (int64_t i = 0; i < count; ++i) {
        for (int k = 0; k < 4; ++k) {
          const E* row = from.row(i, k);
          const A w = from.share(i, k);
          for (int v = 0; v < R; ++v) acc[k % chains][v] += w * load_block<A, V>(row + v * N, some);
        }
      }
      for (int v = 0; v < R; ++v) {
        Float<A> total = acc[0][v] + acc[1][v];
        if constexpr (chains == 4) total += acc[2][v] + acc[3][v];
        store_block<A, V>(out + c + v * N, total + poison, some);
      }
    });
  });
}

// dots[4 * i + k] += with . row of corner k of sample i of the part.
template <class A, class E>
void corner_dots(const Samples<A>& s, Range part, const Table<E>& table, int64_t depth, const A* with, A* dots) {
  with_corners(s, part.first, s.corner, table, [&](auto corners) {
    for_blocks<A>(depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      const auto from = corners(c);
      const int64_t count = part.count;
      if constexpr (V == 0 && std::is_same_v<A, E>) {
        for (int64_t i = 0; i < count && some <= kNarrow; ++i) {
          for (int k = 0; k < 4; ++k) {
            const E* row = from.row(i, k);
            for (int64_t j = 0; j < some; ++j) dots[4 * i + k] += with[c + j] * row[j];
          }
        }
        if (some <= kNarrow) return;
      }
      Float<A> w[R];
      for (int v = 0; v < R; ++v) w[v] = load_block<A, V>(with + c + v * N, some);
      for (int64_t i = 0; i < count; ++i) {
        Float<A> acc[4];
        for (int k = 0; k < 4; ++k) {
          const E* row = from.row(i, k);
          acc[k] = w[0] * load_block<A, V>(row, some);
          for (int v = 1; v < R; ++v) acc[k] += w[v] * load_block<A, V>(row + v * N, some);
        }
        add_sums(dots + 4 * i, acc);
      }
    });
  });
}

// The sampled rows themselves, (count, padded depth), and their dots with a row.
template <class A, class E>
void sample_rows(const Samples<A>& s, Range part, const Table<E>& table, int64_t depth, const A* with, A* dots, A* sampled) {
  with_corners(s, part.first, s.corner, table, [&](auto corners) {
    for_blocks<A>(depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      const auto from = corners(c);
      const int64_t count = part.count, stride = padded(depth);
      A* const to = sampled ? sampled + c : nullptr;
      Float<A> w[R];
      for (int v = 0; v < R; ++v) w[v] = load_block<A, V>(with + c + v * N, some);
      const auto sampled_dot = [&](int64_t i) __attribute__((always_inline)) {
        Float<A> row[R] = {}, dot = {};
        for (int k = 0; k < 4; ++k) {
          const E* corner = from.row(i, k);
          const A share = from.share(i, k);
          for (int v = 0; v < R; ++v) row[v] += share * load_block<A, V>(corner + v * N, some);
        }
        for (int v = 0; v < R; ++v) {
          dot += w[v] * row[v];
          if (to) store(to + i * stride + v * N, row[v]);
        }
        return dot;
      };
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {
        const Float<A> sums[4] = {sampled_dot(i), sampled_dot(i + 1), sampled_dot(i + 2), sampled_dot(i + 3)};
        add_sums(dots + i, sums);
      }
      for (; i < count; ++i) dots[i] += sum(sampled_dot(i));
    });
  });
}

}  // namespace
}  // namespace detrcli_ops
