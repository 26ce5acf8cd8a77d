// The CPU kernels, compiled once per instruction set (DETRCLI_OPS_ISA names the table that this unit exports).
//
// One query and head at a time: the geometry of all its samples is computed in vectors over samples, then the channels
// are swept in vectors over channels. A sample outside, or on padding, points at a row of zeros, so nothing branches and
// a NaN in memory that was not asked for cannot leak. Non-finite locations count as outside, and the answer is poisoned.
#include "problem.h"
#include "vector.h"

namespace detrcli_ops {
namespace {

constexpr int kPad = 16;      // samples are padded to whole vectors of any width
constexpr int64_t kAhead = 4;   // queries between the prefetch of an input and its use
constexpr int64_t kGroup = 64;  // samples located together when scattering

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// ---------------------------------------------------------------------------------------------------- scratch memory

class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* start = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t{63});
    next_ = reinterpret_cast<char*>(start + count);
    return start;
  }

 private:
  char* next_;
};

// ------------------------------------------------------------------------------------------------------ typed access

// Calls f with a null pointer of the element type: the dtype as a type.
template <class A, class F>
inline void with_type(Dtype dtype, F f) {
  if constexpr (sizeof(A) == 8) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == Dtype::bf16) {
    f(static_cast<bf16*>(nullptr));
  } else if (dtype == Dtype::f16) {
    f(static_cast<f16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

template <class E>
inline E* at(const Array& array, int64_t index) {
  return static_cast<E*>(array.data) + index;
}

// Inlined by force, and so are those who only prefetch: GCC takes such a function for one without effect and drops its calls.
#define DETRCLI_OPS_INLINE __attribute__((always_inline)) inline

DETRCLI_OPS_INLINE void prefetch(const Array& array, int64_t index, int64_t count) {
  const int64_t size = array.dtype == Dtype::f64 ? 8 : array.dtype == Dtype::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(array.data) + index * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i);
}

template <class A>
void read(const Array& array, int64_t index, int64_t count, A* to) {
  with_type<A>(array.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* from = at<E>(array, index);
    int64_t i = 0;
    for (; i + Lanes<A>::N <= count; i += Lanes<A>::N) store(to + i, load(from + i));
    if constexpr (std::is_same_v<E, A>) {
      for (; i < count; ++i) to[i] = from[i];
    } else if (i < count) {
      store_some<A>(to + i, load_some<A>(from + i, count - i), count - i);
    }
  });
}

template <class A>
void write(const Array& array, int64_t index, int64_t count, const A* from) {
  with_type<A>(array.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    E* to = at<E>(array, index);
    int64_t i = 0;
    for (; i + Lanes<A>::N <= count; i += Lanes<A>::N) store(to + i, load(from + i));
    if constexpr (std::is_same_v<E, A>) {
      for (; i < count; ++i) to[i] = from[i];
    } else if (i < count) {
      store_some<A>(to + i, load_some<A>(from + i, count - i), count - i);
    }
  });
}

// The elements themselves where they have the working type, else a converted copy.
template <class A>
const A* view(const Array& array, int64_t index, int64_t count, A* copy) {
  if (array.dtype == (sizeof(A) == 8 ? Dtype::f64 : Dtype::f32)) return at<A>(array, index);
  read(array, index, count, copy);
  return copy;
}

// --------------------------------------------------------------------------------------------------------- geometry

// The samples of one query and head (or of a few queries, in one level), as arrays over samples.
template <class A>
struct Samples {
  int64_t count, room;
  A *x, *y, *weight;            // as read: coordinates, attention
  A *base_x, *base_y, *step_x, *step_y;  // pixel = base + step * coordinate
  A *width, *height;            // of the sample's level
  int32_t *columns, *lines, *start;
  A *fx, *fy;                   // distance to the upper left corner
  A* corner[4];                 // bilinear shares: upper left, upper right, lower left, lower right
  int32_t* row[4];              // token of each corner; `outside` where there is none

  Samples(Arena& arena, int64_t count) : count(count), room(padded(count) + kPad) {
    A** reals[] = {&x,     &y,      &weight, &base_x, &base_y,    &step_x,    &step_y,   &width,
                   &height, &fx,     &fy,     &corner[0], &corner[1], &corner[2], &corner[3]};
    int32_t** integers[] = {&columns, &lines, &start, &row[0], &row[1], &row[2], &row[3]};
    for (A** array : reals) {
      *array = arena.take<A>(room);
      std::memset(*array, 0, room * sizeof(A));
    }
    for (int32_t** array : integers) {
      *array = arena.take<int32_t>(room);
      std::memset(*array, 0, room * sizeof(int32_t));
    }
  }
};

template <class A>
size_t samples_bytes(int64_t count) {
  return (padded(count) + kPad) * (15 * sizeof(A) + 7 * sizeof(int32_t)) + 22 * 64;
}

template <class A>
void describe_level(Samples<A>& s, int64_t from, int64_t count, int64_t height, int64_t width, int64_t start) {
  for (int64_t i = from; i < from + count; ++i) {
    s.width[i] = static_cast<A>(width);
    s.height[i] = static_cast<A>(height);
    s.columns[i] = static_cast<int32_t>(width);
    s.lines[i] = static_cast<int32_t>(height);
    s.start[i] = static_cast<int32_t>(start);
    s.base_x[i] = s.base_y[i] = A(-0.5);
    s.step_x[i] = static_cast<A>(width);
    s.step_y[i] = static_cast<A>(height);
  }
}

template <class A>
void describe_levels(Samples<A>& s, const Problem& p) {
  int64_t start = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    describe_level(s, l * p.points, p.points, height, width, start);
    start += height * width;
  }
}

template <class A>
inline void fill(A* to, int64_t count, A value) {  // up to 3 elements beyond, which the room allows for
  for (int64_t i = 0; i < count; i += 4) to[i] = to[i + 1] = to[i + 2] = to[i + 3] = value;
}

// Where offsets of one query count from and in which unit, in pixels of the level.
template <class A>
inline void anchor(Samples<A>& s, int64_t from, int64_t count, A height, A width, const A* reference, int64_t reference_width,
                   int64_t points) {
  fill(s.base_x + from, count, reference[0] * width - A(0.5));
  fill(s.base_y + from, count, reference[1] * height - A(0.5));
  const bool box = reference_width == 4;
  const A unit = A(0.5) / static_cast<A>(points);
  fill(s.step_x + from, count, box ? reference[2] * unit * width : A(1));
  fill(s.step_y + from, count, box ? reference[3] * unit * height : A(1));
}

template <class A>
inline void read_pairs(const Array& array, int64_t index, int64_t count, A* x, A* y) {
  with_type<A>(array.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* from = at<E>(array, index);
    if constexpr (sizeof(E) == 2) {
      A pair[2 * Lanes<A>::N];
      for (int64_t i = 0; i < count; i += Lanes<A>::N) {
        const int64_t n = 2 * (count - i) < 2 * Lanes<A>::N ? 2 * (count - i) : 2 * Lanes<A>::N;
        E some[2 * Lanes<A>::N];
        std::memcpy(some, from + 2 * i, n * sizeof(E));
        std::memset(some + n, 0, (2 * Lanes<A>::N - n) * sizeof(E));
        store(pair, load(some));
        store(pair + Lanes<A>::N, load(some + Lanes<A>::N));
        for (int k = 0; k < Lanes<A>::N; ++k) {
          x[i + k] = pair[2 * k];
          y[i + k] = pair[2 * k + 1];
        }
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        x[i] = from[2 * i];
        y[i] = from[2 * i + 1];
      }
    }
  });
}

// Fills corners and rows; returns 0, or NaN where a location is not finite.
template <class A>
A locate(Samples<A>& s, int32_t outside) {
  using F = Float<A>;
  using I = Int<A>;
  F poison{};
  const F low = splat(A(-2));
  const I none = I{} + outside, nothing{};
  for (int64_t i = 0; i < s.count; i += Lanes<A>::N) {
    const F width = load(s.width + i), height = load(s.height + i);
    F x = load(s.base_x + i) + load(s.step_x + i) * load(s.x + i);
    F y = load(s.base_y + i) + load(s.step_y + i) * load(s.y + i);
    poison += x * A(0) + y * A(0);
    x = x > low ? x : low;  // NaN too
    y = y > low ? y : low;
    x = x < width + A(1) ? x : width + A(1);
    y = y < height + A(1) ? y : height + A(1);
    F left = __builtin_convertvector(__builtin_convertvector(x, I), F);
    F top = __builtin_convertvector(__builtin_convertvector(y, I), F);
    left -= left > x ? splat(A(1)) : F{};
    top -= top > y ? splat(A(1)) : F{};
    const F fx = x - left, fy = y - top;
    store(s.fx + i, fx);
    store(s.fy + i, fy);
    store(s.corner[0] + i, (A(1) - fx) * (A(1) - fy));
    store(s.corner[1] + i, fx * (A(1) - fy));
    store(s.corner[2] + i, (A(1) - fx) * fy);
    store(s.corner[3] + i, fx * fy);
    const I column = __builtin_convertvector(left, I), line = __builtin_convertvector(top, I);
    const I columns = load_as<I>(s.columns + i), lines = load_as<I>(s.lines + i);
    const I in_left = (column >= nothing) & (column < columns), in_right = (column >= -1) & (column < columns - 1);
    const I in_top = (line >= nothing) & (line < lines), in_bottom = (line >= -1) & (line < lines - 1);
    const I row = load_as<I>(s.start + i) + line * columns + column;
    store_as(s.row[0] + i, in_left & in_top ? row : none);
    store_as(s.row[1] + i, in_right & in_top ? row + 1 : none);
    store_as(s.row[2] + i, in_left & in_bottom ? row + columns : none);
    store_as(s.row[3] + i, in_right & in_bottom ? row + columns + 1 : none);
  }
  // lanes beyond the last sample are swept in fours with the others: they must point at zeros
  for (int64_t i = s.count; i % 4; ++i) s.row[0][i] = s.row[1][i] = s.row[2][i] = s.row[3][i] = outside;
  return sum(poison);
}

template <class A>
void leave_padding(Samples<A>& s, const bool* mask, int32_t outside) {
  for (int k = 0; k < 4; ++k) {
    for (int64_t i = 0; i < s.count; ++i) {
      if (s.row[k][i] != outside && mask[s.row[k][i]]) s.row[k][i] = outside;
    }
  }
}

// Softmax over the samples, in place; lanes beyond the last sample become 0.
template <class A>
void softmax(A* logits, int64_t count) {
  const A lowest = A(-INFINITY);
  const int64_t end = padded(count);
  for (int64_t i = count; i < end; ++i) logits[i] = lowest;
  Float<A> most = splat(lowest);
  for (int64_t i = 0; i < end; i += Lanes<A>::N) {
    const Float<A> v = load(logits + i);
    most = v > most ? v : most;
  }
  const Float<A> peak = splat(largest(most));
  Float<A> total{};
  for (int64_t i = 0; i < end; i += Lanes<A>::N) {
    const Float<A> e = exp(load(logits + i) - peak);
    total += e;
    store(logits + i, e);
  }
  const Float<A> share = splat(A(1) / sum(total));
  for (int64_t i = 0; i < end; i += Lanes<A>::N) store(logits + i, load(logits + i) * share);
}

// -------------------------------------------------------------------------------------------------- sweeps over rows

// The rows of one image and head.
template <class E>
struct Table {
  const E* base;
  int64_t stride;
  const E* zeros;  // the row for `outside`
  int32_t outside;
  bool packed;     // zeros lie at their place in the table
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

  Corners(const Samples<A>& s, A* const share[4], const Table<E>& table, int64_t channel)
      : base(table.base + channel), zeros(table.zeros + channel), stride(table.stride), outside(table.outside),
        rows{s.row[0], s.row[1], s.row[2], s.row[3]}, shares{share[0], share[1], share[2], share[3]} {}

  const E* row(int64_t sample, int corner) const {
    const int32_t token = rows[corner][sample];
    return !packed && token == outside ? zeros : base + token * stride;
  }
  A share(int64_t sample, int corner) const { return shares[corner][sample]; }
};

// Calls f(channel -> Corners) with the kind of table as a type.
template <class A, class E, class F>
inline void with_corners(const Samples<A>& s, A* const share[4], const Table<E>& table, F f) {
  if (table.packed) {
    f([&](int64_t channel) { return Corners<A, E, true>(s, share, table, channel); });
  } else {
    f([&](int64_t channel) { return Corners<A, E, false>(s, share, table, channel); });
  }
}

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
void sweep(const Samples<A>& s, A* const share[4], const Table<E>& table, int64_t depth, O* out, A poison) {
  with_corners(s, share, table, [&](auto corners) {
    for_blocks<A>(depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      constexpr int chains = R <= 2 ? 4 : 2;  // independent sums, to hide the latency of the additions
      const auto from = corners(c);
      const int64_t count = s.count;
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

// dots[4 * i + k] += with . row of corner k of sample i.
template <class A, class E>
void corner_dots(const Samples<A>& s, const Table<E>& table, int64_t depth, const A* with, A* dots) {
  with_corners(s, s.corner, table, [&](auto corners) {
    for_blocks<A>(depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      const auto from = corners(c);
      const int64_t count = s.count;
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
void sample_rows(const Samples<A>& s, const Table<E>& table, int64_t depth, const A* with, A* dots, A* sampled) {
  with_corners(s, s.corner, table, [&](auto corners) {
    for_blocks<A>(depth, [&](int64_t c, auto vectors, int64_t some) {
      constexpr int V = vectors, R = V ? V : 1, N = Lanes<A>::N;
      const auto from = corners(c);
      const int64_t count = s.count, stride = padded(depth);
      A* const to = sampled ? sampled + c : nullptr;
      Float<A> w[R];
      for (int v = 0; v < R; ++v) w[v] = load_block<A, V>(with + c + v * N, some);
      for (int64_t i = 0; i < count; i += 4) {
        Float<A> acc[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Float<A> row[R] = {}, dot = {};
          for (int k = 0; k < 4; ++k) {
            const E* corner = from.row(i + j, k);
            const A share = from.share(i + j, k);
            for (int v = 0; v < R; ++v) row[v] += share * load_block<A, V>(corner + v * N, some);
          }
          for (int v = 0; v < R; ++v) {
            dot += w[v] * row[v];
            if (to) store(to + (i + j) * stride + v * N, row[v]);
          }
          acc[j] = dot;
        }
        add_sums(dots + i, acc);
      }
    });
  });
}

// ---------------------------------------------------------------------------------------------- one query and head

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
    if (p.reference) {
      const int64_t per_query = p.levels * p.reference_width;
      const A* from = view(p.reference, (b * p.queries + q) * per_query, per_query, reference);
      for (int64_t l = 0; l < p.levels; ++l) {
        anchor(s, l * p.points, p.points, static_cast<A>(p.shapes[2 * l]), static_cast<A>(p.shapes[2 * l + 1]),
               from + l * p.reference_width, p.reference_width, p.points);
      }
    }
    const A poison = locate(s, outside);
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

  // Gradients by everything that belongs to this query and head.
  void backward(int64_t b, int64_t q, int64_t m, const Table<E>& value, const Table<E>& key, const Gradients& g) {
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
      pairs[2 * i] *= s.step_x[i];
      pairs[2 * i + 1] *= s.step_y[i];
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

// --------------------------------------------------------------------------------------------------- loops over tasks

// Calls f with the working type and the element type of the rows.
template <class F>
void with_rows(const Rows& rows, F f) {
  if (rows.data.dtype == Dtype::f64) {
    f(double{}, double{});
  } else if (rows.data.dtype == Dtype::bf16) {
    f(float{}, bf16{});
  } else if (rows.data.dtype == Dtype::f16) {
    f(float{}, f16{});
  } else {
    f(float{}, float{});
  }
}

// Calls f(b, m, first query, last query) for each task: head by head, so that one head's rows stay in cache.
template <class F>
void for_query_blocks(const Problem& p, int64_t begin, int64_t end, F f) {
  const int64_t blocks = query_blocks(p.queries);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * kQueryBlock, slice = task / blocks;
    const int64_t last = first + kQueryBlock < p.queries ? first + kQueryBlock : p.queries;
    f(slice / p.heads, slice % p.heads, first, last);
  }
}

void forward(const Problem& p, const Rows& value, const Rows& key, Array out, int64_t begin, int64_t end, void* scratch) {
  with_rows(value, [&](auto working, auto element) {
    using A = decltype(working);
    using E = decltype(element);
    Worker<A, E> worker(p, scratch);
    for_query_blocks(p, begin, end, [&](int64_t b, int64_t m, int64_t first, int64_t last) {
      const Table<E> values = worker.table(value, b, m), keys = key ? worker.table(key, b, m) : values;
      with_type<A>(out.dtype, [&](auto* type) {
        using O = std::remove_pointer_t<decltype(type)>;
        for (int64_t q = first; q < last; ++q) {
          worker.foresee(b, q, m, out);
          worker.forward(b, q, m, values, keys, !key, at<O>(out, worker.head(b, q, m) * p.depth));
        }
      });
    });
  });
}

void backward(const Problem& p, const Rows& value, const Rows& key, const Gradients& g, int64_t begin, int64_t end,
              void* scratch) {
  with_rows(value, [&](auto working, auto element) {
    using E = decltype(element);
    Worker<decltype(working), E> worker(p, scratch);
    for_query_blocks(p, begin, end, [&](int64_t b, int64_t m, int64_t first, int64_t last) {
      const Table<E> values = worker.table(value, b, m), keys = key ? worker.table(key, b, m) : values;
      for (int64_t q = first; q < last; ++q) {
        worker.foresee(b, q, m, g.out);
        worker.backward(b, q, m, values, keys, g);
      }
    });
  });
}

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
          for (int v = 0; v < R; ++v) store_block<A, V>(to + v * N, load_block<A, V>(to + v * N, some) + w * add[v], some);
        }
      }
    });
  }
};

// Tasks: `g.levels` levels of one image and head each.
void scatter(const Problem& p, const Scatter& g, int64_t begin, int64_t end, void* scratch) {
  const int64_t parts = (p.levels + g.levels - 1) / g.levels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / parts, first = task % parts * g.levels;
    const int64_t last = first + g.levels < p.levels ? first + g.levels : p.levels;
    if (g.target.dtype == Dtype::f64) {
      Scatterer<double>(p, g, slice / p.heads, slice % p.heads, Arena(scratch)).run(first, last);
    } else {
      Scatterer<float>(p, g, slice / p.heads, slice % p.heads, Arena(scratch)).run(first, last);
    }
  }
}

template <class A>
size_t scatter_room(const Problem& p, bool direct) {
  const int64_t group = kGroup > p.points ? kGroup : p.points, room = padded(group) + kPad;
  const int64_t cells = direct ? 0 : p.tokens;
  return samples_bytes<A>(group) + (3 * padded(p.depth) + 2 * room + cells * p.depth) * sizeof(A) + 16 * 64;
}

// The gradient by reference points and boxes: a sum over heads and points, in a fixed order.
template <class A>
void reference_of(const Problem& p, const Gradients& g, int64_t query) {
  const int64_t samples = p.levels * p.points;
  const A unit = A(0.5) / static_cast<A>(p.points);
  for (int64_t l = 0; l < p.levels; ++l) {
    const A height = static_cast<A>(p.shapes[2 * l]), width = static_cast<A>(p.shapes[2 * l + 1]);
    A total[4 + Lanes<A>::N] = {};
    for (int64_t m = 0; m < p.heads; ++m) {
      const int64_t first = ((query * p.heads + m) * samples + l * p.points) * 2;
      const A* pixels = at<A>(g.pixels, first);
      for (int64_t i = 0; i < p.points; ++i) {
        A offset[2 + Lanes<A>::N];
        read(p.locations, first + 2 * i, 2, offset);
        total[0] += pixels[2 * i];
        total[1] += pixels[2 * i + 1];
        total[2] += pixels[2 * i] * offset[0] * unit;
        total[3] += pixels[2 * i + 1] * offset[1] * unit;
      }
    }
    for (int k = 0; k < 4; ++k) total[k] *= k % 2 ? height : width;
    write(g.reference, (query * p.levels + l) * p.reference_width, p.reference_width, total);
  }
}

void reference(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
  for (int64_t query = begin; query < end; ++query) {
    if (g.reference.dtype == Dtype::f64) {
      reference_of<double>(p, g, query);
    } else {
      reference_of<float>(p, g, query);
    }
  }
}

template <class A>
void pack_token(const Problem& p, const Array& rows, const Array& packed, int64_t b, int64_t token) {
  const bool empty = token == p.tokens || (p.mask && p.mask[b * p.tokens + token]);
  for (int64_t m = 0; m < p.heads; ++m) {
    A* to = at<A>(packed, ((b * p.heads + m) * (p.tokens + 1) + token) * p.depth);
    if (empty) {
      std::memset(to, 0, p.depth * sizeof(A));
    } else {
      read(rows, ((b * p.tokens + token) * p.heads + m) * p.depth, p.depth, to);
    }
  }
}

void pack(const Problem& p, Array rows, Array packed, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / (p.tokens + 1), token = task % (p.tokens + 1);
    if (packed.dtype == Dtype::f64) {
      pack_token<double>(p, rows, packed, b, token);
    } else {
      pack_token<float>(p, rows, packed, b, token);
    }
  }
}

size_t scratch_bytes(const Problem& p, bool wide) { return wide ? worker_bytes<double>(p) : worker_bytes<float>(p); }

size_t scatter_bytes(const Problem& p, bool wide, bool direct) {
  return wide ? scatter_room<double>(p, direct) : scatter_room<float>(p, direct);
}

}  // namespace

extern const Kernels DETRCLI_OPS_ISA;
const Kernels DETRCLI_OPS_ISA = {kBytes, scratch_bytes, scatter_bytes, forward, backward, scatter, reference, pack};

}  // namespace detrcli_ops
