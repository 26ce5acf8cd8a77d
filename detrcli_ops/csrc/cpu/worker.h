// A few queries of one head at a time: the answers, and the gradients by everything that belongs to them.
#pragma once

#include "sweep.h"

namespace detrcli_ops {
namespace {

constexpr int64_t kTogether = 32;  // samples located together: whole vectors, and several softmaxes at a time

inline int64_t queries_together(const Problem& p) {
  const int64_t samples = p.levels * p.points;
  return samples > 0 && samples < kTogether ? kTogether / samples : 1;
}

// Everything a thread needs to work through its queries.
template <class A, class E>
struct Worker {
  const Problem& p;
  int64_t samples, together;
  Samples<A> s;
  A *reference, *poison, *owner, *row, *dots, *key_dots, *sampled, *share[4];
  E* zeros;
  int32_t outside;

  Worker(const Problem& p, void* scratch) : Worker(p, Arena(scratch)) {}

  Worker(const Problem& p, Arena arena)
      : p(p),
        samples(p.levels * p.points),
        together(queries_together(p)),
        s(arena, together * samples),
        outside(static_cast<int32_t>(p.tokens)) {
    reference = arena.take<A>(p.levels * 4);
    poison = arena.take<A>(together);
    owner = arena.take<A>(Lanes<A>::N);
    row = arena.take<A>(padded(p.depth));
    dots = arena.take<A>(4 * s.room);
    key_dots = arena.take<A>(4 * s.room);
    for (A*& array : share) array = arena.take<A>(s.room);
    sampled = arena.take<A>(s.room * padded(p.depth));
    zeros = arena.take<E>(padded(p.depth));
    std::memset(zeros, 0, padded(p.depth) * sizeof(E));
    for (int64_t i = 0; i < together; ++i) describe_levels(s, i * samples, p);
    for (int64_t i = 0; i < Lanes<A>::N && samples; ++i) owner[i] = static_cast<A>(i / samples);
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
  DETRCLI_OPS_INLINE void foresee(int64_t b, int64_t first, int64_t count, int64_t m, const Array& out) const {
    for (int64_t q = first + kAhead; q < first + count + kAhead && q < p.queries; ++q) {
      const int64_t ahead = head(b, q, m);
      prefetch(p.locations, ahead * samples * 2, samples * 2);
      if (p.weights) prefetch(p.weights, ahead * samples, samples);
      if (p.query) prefetch(p.query, ahead * p.depth, p.depth);
      prefetch(out, ahead * p.depth, p.depth);
    }
  }

  // The samples of the i-th of the queries.
  Range part(int64_t i) const { return {i * samples, samples}; }

  // Locates the samples of some queries and what poisons each.
  void place(int64_t b, int64_t first, int64_t count, int64_t m, bool packed) {
    s.count = count * samples;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = part(i).first;
      read_pairs(p.locations, head(b, first + i, m) * samples * 2, samples, s.x + at, s.y + at);
      poison[i] = p.reference ? anchor_levels(b, first + i, at) : A(0);
    }
    if (locate(s, outside) != 0) {
      for (int64_t i = 0; i < count; ++i) poison[i] += poison_of(part(i));
    }
    if (p.mask && !packed) leave_padding(s, 0, s.count, p.mask + b * p.tokens, outside);
  }

  // Counts the offsets of a query from its reference in each level; returns its poison.
  A anchor_levels(int64_t b, int64_t q, int64_t first) {
    const int64_t width = p.reference_width, per_query = p.levels * width;
    const A* from = view(p.reference, (b * p.queries + q) * per_query, per_query, reference);
    A poison = 0;
    for (int64_t l = 0; l < p.levels; ++l) {
      poison += anchor(s, first + l * p.points, p.points, static_cast<A>(p.shapes[2 * l]), static_cast<A>(p.shapes[2 * l + 1]),
                       from + l * width, width, p.points);
    }
    return poison;
  }

  A poison_of(Range part) const {
    A poison = 0;
    for (int64_t i = part.first; i < part.first + part.count; ++i) poison += s.x[i] * A(0) + s.y[i] * A(0);
    return poison;
  }

  // The attention of the samples into s.weight, where it does not depend on keys.
  void attend(int64_t b, int64_t first, int64_t count, int64_t m) {
    A* const to = p.kind == Kind::fused ? key_dots : s.weight;
    for (int64_t i = 0; i < count; ++i) {
      const A* given = view(p.weights, head(b, first + i, m) * samples, samples, dots);
      for (int64_t j = 0; j < samples; j += Lanes<A>::N) store(to + part(i).first + j, load_first(given + j, samples - j));
    }
    if (p.kind == Kind::fused) softmaxes(to, A(1), count);
  }

  // The attention of the samples into s.weight, by their logits.
  void softmaxes(const A* logits, A scale, int64_t count) {
    const int64_t at_once = samples && 2 * samples <= Lanes<A>::N ? Lanes<A>::N / samples : 1;
    for (int64_t i = 0; i < count; i += at_once) {
      A* const to = s.weight + part(i).first;  // whole vectors are written: the next ones come after
      if (at_once > 1) {
        softmax_in_lanes(logits + part(i).first, scale, owner, i + at_once < count ? at_once : count - i, samples, to);
      } else {
        softmax(logits + part(i).first, scale, samples, to);
      }
    }
  }

  void shares() {
    for (int64_t i = 0; i < s.count; i += Lanes<A>::N) {
      for (int k = 0; k < 4; ++k) store(share[k] + i, load(s.weight + i) * load(s.corner[k] + i));
    }
  }

  const A* query(int64_t b, int64_t q, int64_t m) { return view(p.query, head(b, q, m) * p.depth, p.depth, row); }

  // Answers to the queries first..first + count.
  template <class O>
  void forward(int64_t b, int64_t first, int64_t count, int64_t m, const Table<E>& value, const Table<E>& key, bool shared, O* out) {
    place(b, first, count, m, value.packed);
    const auto answer = [&](int64_t i) { return out + head(b, first + i, m) * p.depth; };
    if (p.kind == Kind::kda) {
      const int64_t stride = padded(p.depth);
      std::memset(dots, 0, s.count * sizeof(A));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = part(i).first;
        sample_rows(s, part(i), key, p.depth, query(b, first + i, m), dots + at, shared ? sampled + at * stride : nullptr);
      }
      softmaxes(dots, static_cast<A>(p.scale), count);
      if (shared) {
        for (int64_t i = 0; i < count; ++i) combine(part(i), answer(i), poison[i]);
        return;
      }
    } else {
      attend(b, first, count, m);
    }
    shares();
    for (int64_t i = 0; i < count; ++i) sweep(s, part(i), share, value, p.depth, answer(i), poison[i]);
  }

  // out = sum of weight * sampled row, where key and value are one tensor and were sampled once.
  template <class O>
  void combine(Range part, O* out, A poison) {
    const int64_t stride = padded(p.depth);
    const A *const weight = s.weight + part.first, *const rows = sampled + part.first * stride;
    for_blocks<A>(p.depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      Float<A> acc[2][R] = {};
      int64_t i = 0;
      for (; i + 2 <= samples; i += 2) {
        for (int v = 0; v < R; ++v) {
          acc[0][v] += weight[i] * load(rows + i * stride + c + v * N);
          acc[1][v] += weight[i + 1] * load(rows + (i + 1) * stride + c + v * N);
        }
      }
      for (; i < samples; ++i) {
        for (int v = 0; v < R; ++v) acc[0][v] += weight[i] * load(rows + i * stride + c + v * N);
      }
      for (int v = 0; v < R; ++v) store_block<A, V>(out + c + v * N, acc[0][v] + acc[1][v] + poison, some);
    });
  }

  // Gradients by everything that belongs to the queries first..first + count. `give(grad, part)` is called with what a query's
  // values get, s.weight's share of grad.
  template <class Give>
  void backward(int64_t b, int64_t first, int64_t count, int64_t m, const Table<E>& value, const Table<E>& key,
                const Gradients& g, Give give) {
    place(b, first, count, m, value.packed);
    const auto row_of = [&](int64_t i) { return head(b, first + i, m) * p.depth; };
    const auto samples_of = [&](int64_t i) { return head(b, first + i, m) * samples; };
    const auto grad = [&](int64_t i) { return view(g.out, row_of(i), p.depth, row); };
    A* const by_weight = share[0];  // then by its logit
    if (p.kind == Kind::kda) {
      std::memset(key_dots, 0, 4 * s.count * sizeof(A));
      for (int64_t i = 0; i < count; ++i) corner_dots(s, part(i), key, p.depth, query(b, first + i, m), key_dots + 4 * part(i).first);
      blend(key_dots, by_weight);
      softmaxes(by_weight, static_cast<A>(p.scale), count);
    } else {
      attend(b, first, count, m);
    }
    std::memset(dots, 0, 4 * s.count * sizeof(A));
    for (int64_t i = 0; i < count; ++i) corner_dots(s, part(i), value, p.depth, grad(i), dots + 4 * part(i).first);
    blend(dots, by_weight);
    if (p.kind != Kind::msda) {
      const A scale = p.kind == Kind::kda ? static_cast<A>(p.scale) : A(1);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = part(i).first;
        const A mean = dot(s.weight + at, by_weight + at, samples);
        for (int64_t j = at; j < at + samples; ++j) by_weight[j] = scale * (s.weight[j] * (by_weight[j] - mean));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Array& weights = p.kind == Kind::kda ? g.key_weight : g.weights;
      if (weights) write(weights, samples_of(i), samples, by_weight + part(i).first);
      if (g.attention) write(g.attention, samples_of(i), samples, s.weight + part(i).first);
    }
    if (g.locations || g.pixels) {
      by_location(by_weight);
      for (int64_t i = 0; i < count && g.pixels; ++i) write(g.pixels, 2 * samples_of(i), 2 * samples, pairs() + 2 * part(i).first);
      by_unit();
      for (int64_t i = 0; i < count && g.locations; ++i) write(g.locations, 2 * samples_of(i), 2 * samples, pairs() + 2 * part(i).first);
    }
    for (int64_t i = 0; i < count; ++i) give(grad(i), part(i));
    if (!g.query) return;
    std::memcpy(s.weight, by_weight, s.count * sizeof(A));
    shares();
    for (int64_t i = 0; i < count; ++i) {
      sweep(s, part(i), share, key, p.depth, row, A(0));
      write(g.query, row_of(i), p.depth, row);
    }
  }

  // Each sample's dot, by those of its corners.
  void blend(const A* d, A* to) const {
    for (int64_t i = 0; i < s.count; ++i) {
      to[i] = s.corner[0][i] * d[4 * i] + s.corner[1][i] * d[4 * i + 1] + s.corner[2][i] * d[4 * i + 2] +
              s.corner[3][i] * d[4 * i + 3];
    }
  }

  static A slope_x(const A* d, A fy) { return (d[1] - d[0]) * (1 - fy) + (d[3] - d[2]) * fy; }
  static A slope_y(const A* d, A fx) { return (d[2] - d[0]) * (1 - fx) + (d[3] - d[1]) * fx; }

  A* pairs() const { return sampled; }  // (count, 2), what belongs to the samples' places

  // The gradient by pixels.
  void by_location(const A* by_weight) {
    for (int64_t i = 0; i < s.count; ++i) {
      A x = s.weight[i] * slope_x(dots + 4 * i, s.fy[i]), y = s.weight[i] * slope_y(dots + 4 * i, s.fx[i]);
      if (p.kind == Kind::kda) {
        x += by_weight[i] * slope_x(key_dots + 4 * i, s.fy[i]);
        y += by_weight[i] * slope_y(key_dots + 4 * i, s.fx[i]);
      }
      pairs()[2 * i] = x;
      pairs()[2 * i + 1] = y;
    }
  }

  // From pixels to what was given.
  void by_unit() {
    for (int64_t i = 0; i < s.count; ++i) {
      pairs()[2 * i] = times(pairs()[2 * i], s.step_x[i]);
      pairs()[2 * i + 1] = times(pairs()[2 * i + 1], s.step_y[i]);
    }
  }
};

template <class A>
size_t worker_bytes(const Problem& p) {
  const int64_t together = queries_together(p), count = together * p.levels * p.points;
  const int64_t room = padded(count) + kPad, depth = padded(p.depth);
  const int64_t wide = p.levels * 4 + together + kPad + depth + 12 * room + (room + 1) * (depth > 2 ? depth : 2);
  return samples_bytes<A>(count) + wide * sizeof(A) + 18 * 64;
}

}  // namespace
}  // namespace detrcli_ops
