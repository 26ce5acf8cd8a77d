// The CPU kernels, compiled once per instruction set (DETRCLI_OPS_ISA names the table that this unit exports).
//
// A few queries of one head at a time: the geometry of all their samples is computed in vectors over samples, then the
// channels are swept in vectors over channels, query by query. A sample outside, or on padding, points at a row of zeros,
// so nothing branches and a NaN in memory that was not asked for cannot leak. Non-finite locations count as outside, and
// the answer is poisoned.
#include "normalise.h"
#include "scatter.h"
#include "worker.h"

namespace detrcli_ops {
namespace {

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

// Calls f(first query, queries) for some queries at a time: the same ones, whether or not blocks of queries are shared out.
template <class F>
void for_some(int64_t begin, int64_t end, int64_t together, F f) {
  for (int64_t q = begin; q < end;) {
    const int64_t block_end = (q / kQueryBlock + 1) * kQueryBlock, last = block_end < end ? block_end : end;
    const int64_t count = q + together < last ? together : last - q;
    f(q, count);
    q += count;
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
        for_some(first, last, worker.together, [&](int64_t q, int64_t count) {
          worker.foresee(b, q, count, m, out);
          worker.forward(b, q, count, m, values, keys, !key, at<O>(out, 0));
        });
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
      for_some(first, last, worker.together, [&](int64_t q, int64_t count) {
        worker.foresee(b, q, count, m, g.out);
        worker.backward(b, q, count, m, values, keys, g, [](auto...) {});
      });
    });
  });
}

// Tasks: `g.levels` levels of one image and head each.
void scatter(const Problem& p, const Scatter& g, int64_t begin, int64_t end, void* scratch) {
  const int64_t parts = (p.levels + g.levels - 1) / g.levels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / parts, first = task % parts * g.levels;
    const int64_t last = first + g.levels < p.levels ? first + g.levels : p.levels;
    if (g.to.rows.dtype == Dtype::f64) {
      Scatterer<double>(p, g, slice / p.heads, slice % p.heads, scratch).run(first, last);
    } else {
      Scatterer<float>(p, g, slice / p.heads, slice % p.heads, scratch).run(first, last);
    }
  }
}

// Tasks: one image and head each, without keys. Every row gets what `scatter` gives it, in the same order.
void backward_and_scatter(const Problem& p, const Rows& value, const Gradients& g, const Target& target, int64_t begin,
                          int64_t end, void* scratch) {
  with_rows(value, [&](auto working, auto element) {
    using A = decltype(working);
    using E = decltype(element);
    Worker<A, E> worker(p, scratch);
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t b = slice / p.heads, m = slice % p.heads;
      Arena arena(static_cast<char*>(scratch) + worker_bytes<A>(p));
      const RowSums<A> sums(p, target, b, m, 0, p.tokens, arena);
      const Table<E> table = worker.table(value, b, m);
      const auto give = [&](const A* grad, Range part) {
        const int64_t last = part.first + part.count;
        if (p.mask && table.packed) leave_padding(worker.s, part.first, last, p.mask + b * p.tokens, worker.outside);
        deposit(sums, worker.s, part.first, last, 0, worker.outside, Gift<A>{worker.s.weight, grad});
      };
      for_some(0, p.queries, worker.together, [&](int64_t q, int64_t count) {
        worker.foresee(b, q, count, m, g.out);
        worker.backward(b, q, count, m, table, table, g, give);
      });
      sums.finish();
    }
  });
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
        total[2] += times(pixels[2 * i], offset[0]) * unit;
        total[3] += times(pixels[2 * i + 1], offset[1]) * unit;
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

void normalise(const Pixels& p, int64_t begin, int64_t end) {
  for (int64_t y = begin; y < end; ++y) {
    const bool padding = y >= p.height;
    const uint8_t* from = padding ? nullptr : p.from + y * p.from_stride;
    normalise_row(from, p.scale, p.shift, padding ? 0 : p.width, p.to + y * p.to_stride, p.room);
  }
  streamed();
}

size_t scratch_bytes(const Problem& p, bool wide) { return wide ? worker_bytes<double>(p) : worker_bytes<float>(p); }

size_t scatter_bytes(const Problem& p, bool wide, bool direct) {
  return wide ? scatter_room<double>(p, direct) : scatter_room<float>(p, direct);
}

size_t sums_bytes(const Problem& p, bool wide, bool direct) {
  return wide ? worker_bytes<double>(p) + RowSums<double>::bytes(p, direct)
              : worker_bytes<float>(p) + RowSums<float>::bytes(p, direct);
}

}  // namespace

extern const Kernels DETRCLI_OPS_ISA;
const Kernels DETRCLI_OPS_ISA = {kBytes, scratch_bytes, scatter_bytes, sums_bytes, forward, backward, scatter, backward_and_scatter,
                                 reference, pack, normalise};

}  // namespace detrcli_ops
