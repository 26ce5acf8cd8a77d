// The operators on CUDA.
//
// A group of lanes of one warp serves one query and head; each lane owns a few channels, read as one 16-byte word. The
// geometry of a sample is computed once, by one lane, and handed round by shuffles. Blocks walk tiles of queries of one
// head, two-dimensional tiles where the queries are the tokens, so that what neighbours read stays in L1.
#include "../operators.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

namespace detrcli_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kMostLevels = 32;
constexpr int kMostShared = 48 * 1024;  // what every device grants without asking; more would cost occupancy
constexpr unsigned kAll = 0xffffffffu;

enum class Dtype : int { f64, f32, bf16, f16 };

struct Array {
  void* data;
  Dtype dtype;
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

struct Level {
  int height, width;
  int64_t start;
  int shared;  // first element of its gradient in shared memory, or -1
};

struct Problem {
  int64_t batch, tokens, queries;
  int heads, depth, levels, points;
  Level level[kMostLevels];
  Array value, key, query, locations, weights, reference;
  int reference_width;
  bool softmax;   // weights are logits
  bool grid;      // queries are the tokens: tile them in two dimensions
  const bool* mask;
  double scale;
  int64_t tiles;
  __host__ __device__ int samples() const { return levels * points; }
};

// Where backward writes; absent arrays are not wanted.
struct Outputs {
  Array grad;                                // in: (B, Q, M, D)
  Array query, locations, weights;           // like the inputs
  Array raw;                                 // (B, Q, M, L*P) working type: gradient by attention, before softmax
  Array pixels;                              // (B, Q, M, L*P, 2) working type: gradient by pixel, for the reference
  Array value, key;                          // (B, S, M, D) working type, or int64 in deterministic mode; zeroed
  const float* bound;                        // deterministic mode: a bound of every addend, else null
  int shared_elements;
};

// ------------------------------------------------------------------------------------------------------ typed access

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(double x) { return static_cast<T>(x); }
template <class T>
__device__ inline T narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return static_cast<T>(x);
  }
}

template <class A>
__device__ inline A get(const Array& array, int64_t i) {
  if constexpr (std::is_same_v<A, double>) {
    return static_cast<const double*>(array.data)[i];
  } else {
    if (array.dtype == Dtype::bf16) return widen(static_cast<const __nv_bfloat16*>(array.data)[i]);
    if (array.dtype == Dtype::f16) return widen(static_cast<const __half*>(array.data)[i]);
    return static_cast<const float*>(array.data)[i];
  }
}

template <class A>
__device__ inline void put(const Array& array, int64_t i, A x) {
  if constexpr (std::is_same_v<A, double>) {
    static_cast<double*>(array.data)[i] = x;
  } else {
    if (array.dtype == Dtype::bf16) {
      static_cast<__nv_bfloat16*>(array.data)[i] = __float2bfloat16(x);
    } else if (array.dtype == Dtype::f16) {
      static_cast<__half*>(array.data)[i] = __float2half(x);
    } else {
      static_cast<float*>(array.data)[i] = x;
    }
  }
}

// V elements, by one 16-byte load where V fills it.
template <class A, class T, int V>
__device__ inline void load_row(const T* from, A (&to)[V]) {
  if constexpr (V * sizeof(T) == 16) {
    const uint4 word = __ldg(reinterpret_cast<const uint4*>(from));
    T parts[V];
    memcpy(parts, &word, 16);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen(parts[v]);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen(__ldg(from + v));
  }
}

template <class A, class T, int V>
__device__ inline void store_row(T* to, const A (&from)[V]) {
  if constexpr (V * sizeof(T) == 16) {
    T parts[V];
#pragma unroll
    for (int v = 0; v < V; ++v) parts[v] = narrow<T>(from[v]);
    uint4 word;
    memcpy(&word, parts, 16);
    *reinterpret_cast<uint4*>(to) = word;
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = narrow<T>(from[v]);
  }
}

// --------------------------------------------------------------------------------------------------- groups of lanes

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

// --------------------------------------------------------------------------------------------------------- geometry

// One sample. Corners: 0 upper left, 1 upper right, 2 lower left, 3 lower right; bit k of `inside` allows corner k.
template <class A>
struct Sample {
  int row;  // token of the upper left corner, in its level
  int level;
  unsigned inside;
  A fx, fy, attention, step_x, step_y;

  __device__ A share(int k) const { return (k & 1 ? fx : 1 - fx) * (k & 2 ? fy : 1 - fy); }
  __device__ int token(int k, int width) const { return row + (k & 1) + (k & 2 ? width : 0); }
  __device__ A slope_x(const A* d) const { return (d[1] - d[0]) * (1 - fy) + (d[3] - d[2]) * fy; }
  __device__ A slope_y(const A* d) const { return (d[2] - d[0]) * (1 - fx) + (d[3] - d[1]) * fx; }
};

// The sample j of a head of a query. A location that is not finite counts as outside and makes `poison` NaN.
template <class A>
__device__ Sample<A> locate(const Problem& p, int64_t b, int64_t query, int64_t head, int j, A& poison) {
  Sample<A> s{};
  s.level = j / p.points;
  const Level& level = p.level[s.level];
  const int64_t at = (head * p.samples() + j) * 2;
  A x = get<A>(p.locations, at), y = get<A>(p.locations, at + 1);
  A base_x = A(-0.5), base_y = A(-0.5);
  s.step_x = static_cast<A>(level.width);
  s.step_y = static_cast<A>(level.height);
  if (p.reference) {
    const int64_t ref = (query * p.levels + s.level) * p.reference_width;
    base_x = get<A>(p.reference, ref) * level.width - A(0.5);
    base_y = get<A>(p.reference, ref + 1) * level.height - A(0.5);
    const A unit = A(0.5) / static_cast<A>(p.points);
    s.step_x = p.reference_width == 4 ? get<A>(p.reference, ref + 2) * unit * level.width : A(1);
    s.step_y = p.reference_width == 4 ? get<A>(p.reference, ref + 3) * unit * level.height : A(1);
  }
  x = base_x + s.step_x * x;
  y = base_y + s.step_y * y;
  poison += x * A(0) + y * A(0);
  x = x > A(-2) ? x : A(-2);  // NaN too
  y = y > A(-2) ? y : A(-2);
  x = x < A(level.width + 1) ? x : A(level.width + 1);
  y = y < A(level.height + 1) ? y : A(level.height + 1);
  const A left = floor(x), top = floor(y);
  s.fx = x - left;
  s.fy = y - top;
  const int column = static_cast<int>(left), line = static_cast<int>(top);
  s.row = line * level.width + column;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int cx = column + (k & 1), cy = line + (k >> 1);
    bool inside = cx >= 0 && cx < level.width && cy >= 0 && cy < level.height;
    if (inside && p.mask) inside = !p.mask[b * p.tokens + level.start + s.token(k, level.width)];
    s.inside |= static_cast<unsigned>(inside) << k;
  }
  return s;
}

template <int LANES, class A>
__device__ inline Sample<A> from_lane(const Sample<A>& s, int lane) {
  Sample<A> t;
  t.row = __shfl_sync(kAll, s.row, lane, LANES);
  t.level = __shfl_sync(kAll, s.level, lane, LANES);
  t.inside = __shfl_sync(kAll, s.inside, lane, LANES);
  t.fx = __shfl_sync(kAll, s.fx, lane, LANES);
  t.fy = __shfl_sync(kAll, s.fy, lane, LANES);
  t.attention = __shfl_sync(kAll, s.attention, lane, LANES);
  t.step_x = t.step_y = 0;  // stay with the lane that located the sample
  return t;
}

// Peak and total of a softmax over the samples' logits; lanes share the work.
template <int LANES, class A>
__device__ void softmax_parts(const Problem& p, int64_t head, int lane, A& peak, A& total) {
  peak = A(-INFINITY);
  for (int j = lane; j < p.samples(); j += LANES) peak = larger(get<A>(p.weights, head * p.samples() + j), peak);
  peak = group_max<LANES>(peak);
  total = 0;
  for (int j = lane; j < p.samples(); j += LANES) total += exp(get<A>(p.weights, head * p.samples() + j) - peak);
  total = group_sum<LANES>(total);
}

// ------------------------------------------------------------------------------------------------------------- rows

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

// ---------------------------------------------------------------------------------------------------------- forward

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

// --------------------------------------------------------------------------------------------------------- backward

// Fixed point for the deterministic mode: integer sums do not depend on their order.
__device__ inline double fixed_scale(const Problem& p, float bound) {
  const double addends = static_cast<double>(p.queries) * p.samples() * 4;
  return bound > 0 ? exp2(floor(61 - log2(addends) - log2(static_cast<double>(bound)))) : 1;
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
          const double addend = static_cast<double>(share * row.x[c][v]) * scale;
          atomicAdd(to + v, static_cast<unsigned long long>(__double2ll_rn(addend)));
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
  const Scatter<T, LANES, V, C> scatter{g, o, shared, o.bound ? fixed_scale(p, *o.bound) : 0.0};

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
        put(o.locations, (first + j) * 2, x * own.step_x);
        put(o.locations, (first + j) * 2 + 1, y * own.step_y);
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
      total[2] += x * get<A>(p.locations, at) * unit;
      total[3] += y * get<A>(p.locations, at + 1) * unit;
    }
  }
  for (int k = 0; k < p.reference_width; ++k) {
    put(to, i * p.reference_width + k, total[k] * static_cast<A>(k % 2 ? p.level[l].height : p.level[l].width));
  }
}

// ---------------------------------------------------------------------------------------------- deterministic mode

__global__ void largest_kernel(Array array, int64_t count, unsigned* most) {
  float largest = 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const float x = array.dtype == Dtype::f64 ? static_cast<float>(fabs(get<double>(array, i))) : fabsf(get<float>(array, i));
    largest = larger(x, largest);
  }
  // the order of non-negative floats is that of their bits, and NaN is above all
  atomicMax(most, __float_as_uint(largest));
}

// bound = largest of [gradient, weights, value, query] combined as the addends combine them.
__global__ void bound_kernel(const float* most, bool kda, bool softmax, bool shared, int depth, float scale, float* bound) {
  const float grad = most[0], weight = softmax || kda ? 1 : most[1];
  const float by_key = kda ? 2 * fabsf(scale) * depth * grad * most[2] * most[3] : 0;
  *bound = shared ? grad + by_key : larger(grad * weight, by_key);
  if (!(*bound < INFINITY)) *bound = NAN;
}

template <class T>
__global__ void unfix_kernel(const __grid_constant__ Problem p, const long long* from, T* to, int64_t count, const float* bound) {
  const double scale = fixed_scale(p, *bound);
  const bool finite = *bound == *bound;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    to[i] = narrow<T>(finite ? static_cast<A>(static_cast<double>(from[i]) / scale) : static_cast<A>(NAN));
  }
}

// ------------------------------------------------------------------------------------------------------------- host

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: return Dtype::f32;
  }
}

Array array(const Tensor& tensor) { return {tensor.data_ptr(), dtype_of(tensor)}; }
Array array(const MaybeTensor& tensor) { return tensor ? array(*tensor) : Array{}; }
Array array_if(bool need, const Tensor& tensor) { return need ? array(tensor) : Array{}; }

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Problem problem_of(const Call& c) {
  const Sizes& s = c.sizes;
  STD_TORCH_CHECK(s.levels <= kMostLevels, "detrcli_ops: CUDA takes at most ", kMostLevels, " levels, got ", s.levels);
  STD_TORCH_CHECK(s.heads <= 65535 && s.batch <= 65535, "detrcli_ops: CUDA takes at most 65535 heads and pictures");
  STD_TORCH_CHECK(s.depth <= 256, "detrcli_ops: CUDA takes heads of at most 256 channels, got ", s.depth);
  STD_TORCH_CHECK(s.samples() < (int64_t{1} << 30), "detrcli_ops: too many samples per query: ", s.samples());
  Problem p{};
  p.batch = s.batch;
  p.tokens = s.tokens;
  p.queries = s.queries;
  p.heads = static_cast<int>(s.heads);
  p.depth = static_cast<int>(s.depth);
  p.levels = static_cast<int>(s.levels);
  p.points = static_cast<int>(s.points);
  int64_t start = 0;
  for (int l = 0; l < p.levels; ++l) {
    p.level[l] = {static_cast<int>(c.shapes[2 * l]), static_cast<int>(c.shapes[2 * l + 1]), start, -1};
    start += c.shapes[2 * l] * c.shapes[2 * l + 1];
  }
  p.value = array(c.value);
  p.key = array(c.key);
  p.query = array(c.query);
  p.locations = array(c.locations);
  p.weights = array(c.weights);
  p.reference = array(c.reference);
  p.reference_width = c.reference ? static_cast<int>(c.reference->size(3)) : 0;
  p.softmax = c.reference && !c.query;
  p.grid = s.queries == s.tokens;
  p.mask = c.mask ? static_cast<const bool*>(c.mask->data_ptr()) : nullptr;
  p.scale = c.scale;
  return p;
}

int processors(const Tensor& tensor) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

int blocks_for(int64_t count) { return static_cast<int>(std::clamp<int64_t>((count + kThreads - 1) / kThreads, 1, 65536)); }

// Calls f(lanes, elements per word, words per lane) as types; words need rows that start on 16 bytes.
template <class T, class F>
void with_layout(int depth, bool aligned, F f) {
  constexpr int wide = 16 / sizeof(T);
  using std::integral_constant;
  if constexpr (!std::is_same_v<T, double>) {
    const int words = depth / wide;
    if (aligned && depth % wide == 0 && words <= 32) {
      integral_constant<int, wide> v;
      integral_constant<int, 1> c;
      if (words <= 4) return f(integral_constant<int, 4>{}, v, c);
      if (words <= 8) return f(integral_constant<int, 8>{}, v, c);
      if (words <= 16) return f(integral_constant<int, 16>{}, v, c);
      return f(integral_constant<int, 32>{}, v, c);
    }
  }
  if (depth <= 32) return f(integral_constant<int, 32>{}, integral_constant<int, 1>{}, integral_constant<int, 1>{});
  f(integral_constant<int, 32>{}, integral_constant<int, 1>{}, integral_constant<int, 8>{});
}

template <class F>
void with_dtype(const Tensor& tensor, F f) {
  switch (dtype_of(tensor)) {
    case Dtype::f64: return f(double{});
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(__nv_bfloat16{});
    case Dtype::f16: return f(__half{});
  }
}

bool aligned(std::initializer_list<Array> arrays) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [](const Array& a) { return reinterpret_cast<uintptr_t>(a.data) % 16 == 0; });
}

// Levels from the smallest up while their gradients fit in shared memory; returns the elements used.
int share_levels(Problem& p, size_t element) {
  int used = 0;
  std::vector<int> order(p.levels);
  for (int l = 0; l < p.levels; ++l) order[l] = l;
  const auto cells = [&](int l) { return int64_t{p.level[l].height} * p.level[l].width; };
  std::sort(order.begin(), order.end(), [&](int a, int b) { return cells(a) < cells(b); });
  for (const int l : order) {
    const int64_t size = cells(l) * p.depth;
    if (size == 0) continue;
    if ((used + size) * static_cast<int64_t>(element) > kMostShared) break;
    p.level[l].shared = used;
    used += static_cast<int>(size);
  }
  return used;
}

// The bound of all addends of the scattered gradients, on the device.
Tensor bound_of(const Call& c, const Tensor& grad, cudaStream_t stream) {
  Tensor most = make(c.value, {5}, ScalarType::Float);
  torch::stable::zero_(most);
  auto* slots = static_cast<float*>(most.data_ptr());
  const auto largest = [&](const Tensor& tensor, int slot) {
    largest_kernel<<<std::min(blocks_for(tensor.numel()), 1024), kThreads, 0, stream>>>(
        array(tensor), tensor.numel(), reinterpret_cast<unsigned*>(slots + slot));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  largest(grad, 0);
  if (c.weights) largest(*c.weights, 1);
  if (c.query) {
    largest(*c.query, 3);
    largest(c.value, 2);
  }
  bound_kernel<<<1, 1, 0, stream>>>(slots, bool(c.query), c.reference && !c.query, c.query && !c.key,
                                    static_cast<int>(c.sizes.depth), static_cast<float>(c.scale), slots + 4);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return most;
}

// The buffer of a scattered gradient as the caller's dtype.
Tensor finished(const Call& c, const Problem& p, const Tensor& buffer, const float* bound, cudaStream_t stream) {
  if (!bound) return buffer.scalar_type() == c.value.scalar_type() ? buffer : torch::stable::to(buffer, c.value.scalar_type());
  Tensor out = torch::stable::empty_like(c.value);
  with_dtype(c.value, [&](auto element) {
    using T = decltype(element);
    unfix_kernel<T><<<blocks_for(out.numel()), kThreads, 0, stream>>>(
        p, static_cast<const long long*>(buffer.data_ptr()), static_cast<T*>(out.data_ptr()), out.numel(), bound);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

Tensor forward(const Call& c) {
  const Sizes& s = c.sizes;
  Problem p = problem_of(c);
  const torch::stable::accelerator::DeviceGuard guard(c.value.get_device_index());
  Tensor out = make(c.value, {s.batch, s.queries, s.heads * s.depth}, c.value.scalar_type());
  if (out.numel() == 0) return out;
  if (s.empty()) {
    torch::stable::zero_(out);
    return out;
  }
  const cudaStream_t stream = stream_of(c.value);
  with_dtype(c.value, [&](auto element) {
    using T = decltype(element);
    with_layout<T>(p.depth, aligned({p.value, p.key, p.query, array(out)}), [&](auto lanes, auto wide, auto words) {
      p.tiles = tiles_of(p, kThreads / lanes);
      const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.tiles, 1 << 30)), p.heads, static_cast<unsigned>(p.batch));
      T* to = static_cast<T*>(out.data_ptr());
      if (c.query) {
        forward_kernel<T, lanes, wide, words, true><<<grid, kThreads, 0, stream>>>(p, to);
      } else {
        forward_kernel<T, lanes, wide, words, false><<<grid, kThreads, 0, stream>>>(p, to);
      }
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

Grads backward(const Call& c, const Tensor& grad, Needs needs) {
  const Sizes& s = c.sizes;
  const bool kda = bool(c.query), fused = c.reference && !kda;
  const torch::stable::accelerator::DeviceGuard guard(c.value.get_device_index());
  if (s.empty()) return empty_grads(c, needs);
  Problem p = problem_of(c);
  const cudaStream_t stream = stream_of(c.value);
  const ScalarType working = working_type(c), summed = needs.deterministic ? ScalarType::Long : working;
  Grads g = make_grads(c, needs);
  const std::vector<int64_t> per_sample{s.batch, s.queries, s.heads, s.samples()}, nothing{0};
  std::vector<int64_t> pairs = per_sample;
  pairs.push_back(2);
  const Tensor raw = make(c.value, needs.geometry && fused ? per_sample : nothing, working);
  const Tensor pixels = make(c.value, needs.reference ? pairs : nothing, working);
  const Tensor d_value = needs.rows ? make_zeros(c.value, summed) : none(c.value);
  const Tensor d_key = needs.rows && c.key ? make_zeros(*c.key, summed) : none(c.value);
  MaybeTensor most;
  if (needs.rows && needs.deterministic) most = bound_of(c, grad, stream);
  const float* bound = most ? static_cast<const float*>(most->data_ptr()) + 4 : nullptr;
  Outputs o{array(grad),
            array_if(needs.geometry && kda, g.query),
            array_if(needs.geometry, g.locations),
            array_if(needs.geometry && !kda, g.weights),
            array_if(needs.geometry && fused, raw),
            array_if(needs.reference, pixels),
            array_if(needs.rows, d_value),
            array_if(needs.rows && c.key, d_key),
            bound,
            0};
  with_dtype(c.value, [&](auto element) {
    using T = decltype(element);
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    if (needs.rows && !bound && !c.key) o.shared_elements = share_levels(p, sizeof(A));
    with_layout<T>(p.depth, aligned({p.value, p.key, p.query, o.grad, o.query}), [&](auto lanes, auto wide, auto words) {
      p.tiles = tiles_of(p, kThreads / lanes);
      // few enough blocks that each gathers many queries before it flushes its shared levels
      const int64_t slices = int64_t{p.heads} * p.batch, resident = 4 * int64_t{processors(c.value)};
      const int64_t across = std::clamp<int64_t>((resident + slices - 1) / slices, 1, p.tiles);
      const dim3 grid(static_cast<unsigned>(across), p.heads, static_cast<unsigned>(p.batch));
      const size_t memory = o.shared_elements * sizeof(A);
      if (kda) {
        backward_kernel<T, lanes, wide, words, true><<<grid, kThreads, memory, stream>>>(p, o);
      } else {
        backward_kernel<T, lanes, wide, words, false><<<grid, kThreads, memory, stream>>>(p, o);
      }
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  if (needs.reference) {
    const int blocks = static_cast<int>((s.batch * s.queries * s.levels + kThreads - 1) / kThreads);
    if (working == ScalarType::Double) {
      reference_kernel<double><<<blocks, kThreads, 0, stream>>>(p, array(pixels), array(g.reference));
    } else {
      reference_kernel<float><<<blocks, kThreads, 0, stream>>>(p, array(pixels), array(g.reference));
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (needs.rows) g.value = finished(c, p, d_value, bound, stream);
  if (needs.rows && c.key) g.key = finished(c, p, d_key, bound, stream);
  return g;
}

STABLE_TORCH_LIBRARY_IMPL(detrcli_ops, CUDA, m) { register_operators(m); }

}  // namespace detrcli_ops
