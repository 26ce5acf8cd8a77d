// One query and head at a time: the answer, and the gradients by everything that belongs to them.
#pragma once

#include "sweep.h"

namespace detrcli_ops {
namespace {

// Everything a thread needs to work through its queries.
template <class A, class E>
struct Worker {
  const Problem& p;
  int64_t samples;
  Samples<A> s;
  A *reference, *row, *dots, *key_dots, *sampled, *share[4];
  E* zeros;
  int32_t outside;

  Worker(const Problem& p, void* scratch) : Worker(p, Arena(scratch)) {}

  Worker(const Problem& p, Arena arena)
      : p(p), samples(p.levels * p.points), s(arena, samples), outside(static_cast<int32_t>(p.tokens)) {
    reference = arena.take<A>(p.levels * 4);
    row = arena.take<A>(2 * padded(p.depth));
    dots = arena.take<A>(4 * s.room);
    key_dots = arena.take<A>(4 * s.room);
    for (A*& array : share) array = arena.take<A>(s.room);
    sampled = arena.take<A>(s.room * padded(p.depth));
    zeros = arena.take<E>(padded(p.depth));
    std::memset(zeros, 0, padded(p.depth) * sizeof(E));
    describe_levels(s, p);
  }

  Table<E> table(const Rows& rows, int64_t b, int64_t m) const {
    if (rows.packed) {
      const E* base = at<E>(rows.data, (b * p.heads + m) * (p.tokens + 1) * p.depth);
      return {base, p.depth, zeros, outside, true};
    }
    const E* base = at<E>(rows.data, (b * p.tokens * p.heads + m) * p.depth);
    return {base, p.heads * p.depth, zeros, outside, false};
  }

  int64_t head(int64_t b, int64_t q, int64_t m) const { return (b * p.queries + q) * p.heads + m; }

  // One head reads every M-th piece of its inputs, a stride that the hardware does not foresee.
  DETRCLI_OPS_INLINE void foresee(int64_t b, int64_t q, int64_t m, const Array& out) const {
    const int64_t ahead = head(b, q + kAhead, m);
    if (q + kAhead >= p.queries) return;
    prefetch(p.locations, ahead * samples * 2, samples * 2);
    if (p.weights) prefetch(p.weights, ahead * samples, samples);
    if (p.query) prefetch(p.query, ahead * p.depth, p.depth);
    prefetch(out, ahead * p.depth, p.depth);
  }

  // Locates the samples of a query and head; returns the poison.
  A place(int64_t b, int64_t q, int64_t m, bool packed) {
    read_pairs(p.locations, head(b, q, m) * samples * 2, samples, s.x, s.y);
    A poison = 0;
    if (p.reference) {
      const int64_t per_query = p.levels * p.reference_width;
      const A* from = view(p.reference, (b * p.queries + q) * per_query, per_query, reference);
      for (int64_t l = 0; l < p.levels; ++l) {
        poison += anchor(s, l * p.points, p.points, static_cast<A>(p.shapes[2 * l]), static_cast<A>(p.shapes[2 * l + 1]),
                         from + l * p.reference_width, p.reference_width, p.points);
      }
    }
    poison += locate(s, outside);
    if (p.mask && !packed) leave_padding(s, p.mask + b * p.tokens, outside);
    return poison;
  }

  // The attention of the samples into s.weight, where it does not depend on keys.
  void attend(int64_t b, int64_t q, int64_t m) {
    read(p.weights, head(b, q, m) * samples, samples, s.weight);
    if (p.kind == Kind::fused) softmax(s.weight, samples);
  }

  void shares(const A* weight) {
    for (int64_t i = 0; i < s.room - kPad; i += Lanes<A>::N) {
      for (int k = 0; k < 4; ++k) store(share[k] + i, load(weight + i) * load(s.corner[k] + i));
    }
  }

  const A* query(int64_t b, int64_t q, int64_t m) { return view(p.query, head(b, q, m) * p.depth, p.depth, row); }

  template <class O>
  void forward(int64_t b, int64_t q, int64_t m, const Table<E>& value, const Table<E>& key, bool shared, O* out) {
    const A poison = place(b, q, m, value.packed);
    if (p.kind != Kind::kda) {
      attend(b, q, m);
      shares(s.weight);
      sweep(s, share, value, p.depth, out, poison);
      return;
    }
    std::memset(dots, 0, s.room * sizeof(A));
    sample_rows(s, key, p.depth, query(b, q, m), dots, shared ? sampled : nullptr);
    for (int64_t i = 0; i < samples; ++i) s.weight[i] = dots[i] * static_cast<A>(p.scale);
    softmax(s.weight, samples);
    if (shared) {
      combine(out, poison);
    } else {
      shares(s.weight);
      sweep(s, share, value, p.depth, out, poison);
    }
  }

  // out = sum of weight * sampled row, where key and value are one tensor and were sampled once.
  template <class O>
  void combine(O* out, A poison) {
    const int64_t stride = padded(p.depth);
    for_blocks<A>(p.depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      Float<A> acc[2][R] = {};
      int64_t i = 0;
      for (; i + 2 <= samples; i += 2) {
        for (int v = 0; v < R; ++v) {
          acc[0][v] += s.weight[i] * load(sampled + i * stride + c + v * N);
          acc[1][v] += s.weight[i + 1] * load(sampled + (i + 1) * stride + c + v * N);
        }
      }
      for (; i < samples; ++i) {
        for (int v = 0; v < R; ++v) acc[0][v] += s.weight[i] * load(sampled + i * stride + c + v * N);
      }
      for (int v = 0; v < R; ++v) store_block<A, V>(out + c + v * N, acc[0][v] + acc[1][v] + poison, some);
    });
  }

  // Gradients by everything that belongs to this query and head. `give(grad, attention)` is called with what the values get,
  // the attention's share of grad.
  template <class Give>
  void backward(int64_t b, int64_t q, int64_t m, const Table<E>& value, const Table<E>& key, const Gradients& g, Give give) {
    place(b, q, m, value.packed);
    const int64_t first = head(b, q, m) * samples;
    const A* grad = view(g.out, head(b, q, m) * p.depth, p.depth, row + padded(p.depth));
    std::memset(dots, 0, 4 * s.room * sizeof(A));
    corner_dots(s, value, p.depth, grad, dots);
    if (p.kind == Kind::kda) {
      std::memset(key_dots, 0, 4 * s.room * sizeof(A));
      corner_dots(s, key, p.depth, query(b, q, m), key_dots);
      for (int64_t i = 0; i < samples; ++i) s.weight[i] = blend(key_dots, i) * static_cast<A>(p.scale);
      softmax(s.weight, samples);
    } else {
      attend(b, q, m);
    }
    // s.weight: attention; by_weight: gradient by it, then by its logit
    A* by_weight = share[0];
    for (int64_t i = 0; i < samples; ++i) by_weight[i] = blend(dots, i);
    if (p.kind != Kind::msda) {
      A mean = 0;
      for (int64_t i = 0; i < samples; ++i) mean += s.weight[i] * by_weight[i];
      for (int64_t i = 0; i < samples; ++i) by_weight[i] = s.weight[i] * (by_weight[i] - mean);
    }
    if (p.kind == Kind::kda) {
      for (int64_t i = 0; i < samples; ++i) by_weight[i] *= static_cast<A>(p.scale);
      if (g.key_weight) write(g.key_weight, first, samples, by_weight);
    } else if (g.weights) {
      write(g.weights, first, samples, by_weight);
    }
    if (g.attention) write(g.attention, first, samples, s.weight);
    if (g.locations || g.pixels) write_locations(first, by_weight, g);
    give(grad, s.weight);
    if (g.query) {
      for (int64_t i = samples; i < s.room; ++i) by_weight[i] = 0;
      std::memcpy(s.weight, by_weight, s.room * sizeof(A));
      shares(s.weight);
      sweep(s, share, key, p.depth, row, A(0));
      write(g.query, head(b, q, m) * p.depth, p.depth, row);
    }
  }

  A blend(const A* d, int64_t i) const {
    return s.corner[0][i] * d[4 * i] + s.corner[1][i] * d[4 * i + 1] + s.corner[2][i] * d[4 * i + 2] +
           s.corner[3][i] * d[4 * i + 3];
  }

  static A slope_x(const A* d, A fy) { return (d[1] - d[0]) * (1 - fy) + (d[3] - d[2]) * fy; }
  static A slope_y(const A* d, A fx) { return (d[2] - d[0]) * (1 - fx) + (d[3] - d[1]) * fx; }

  void write_locations(int64_t first, const A* by_weight, const Gradients& g) {
    A* pairs = sampled;
    for (int64_t i = 0; i < samples; ++i) {
      A x = s.weight[i] * slope_x(dots + 4 * i, s.fy[i]), y = s.weight[i] * slope_y(dots + 4 * i, s.fx[i]);
      if (p.kind == Kind::kda) {
        x += by_weight[i] * slope_x(key_dots + 4 * i, s.fy[i]);
        y += by_weight[i] * slope_y(key_dots + 4 * i, s.fx[i]);
      }
      pairs[2 * i] = x;
      pairs[2 * i + 1] = y;
    }
    if (g.pixels) write(g.pixels, 2 * first, 2 * samples, pairs);
    if (!g.locations) return;
    for (int64_t i = 0; i < samples; ++i) {
      pairs[2 * i] = times(pairs[2 * i], s.step_x[i]);
      pairs[2 * i + 1] = times(pairs[2 * i + 1], s.step_y[i]);
    }
    write(g.locations, 2 * first, 2 * samples, pairs);
  }
};

template <class A>
size_t worker_bytes(const Problem& p) {
  const int64_t samples = p.levels * p.points, room = padded(samples) + kPad, depth = padded(p.depth);
  const int64_t wide = p.levels * 4 + 2 * depth + 12 * room + (room + 1) * (depth > 2 ? depth : 2);
  return samples_bytes<A>(samples) + wide * sizeof(A) + 16 * 64;
}

}  // namespace
}  // namespace detrcli_ops
