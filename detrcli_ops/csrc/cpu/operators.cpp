// The operators on the CPU: memory, threads and the choice of instruction set; the arithmetic is in kernels.cpp.
#include "../operators.h"
#include "problem.h"

#include <cstdlib>
#include <cstring>
#include <memory>

namespace detrcli_ops {

// The tables that were built, widest first: DETRCLI_OPS_ISAS is ISA(name) for each.
#define ISA(name) extern const Kernels kernels_##name;
DETRCLI_OPS_ISAS
#undef ISA
#define ISA(name) &kernels_##name,
static const Kernels* const tables[] = {DETRCLI_OPS_ISAS};
#undef ISA

static bool runs_here(const Kernels* table) {
#if defined(__x86_64__)
  if (table->vector_bytes == 64) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (table->vector_bytes == 32) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  return __builtin_cpu_supports("sse4.1");
#else
  return true;
#endif
}

// The widest table this processor runs with vectors of at most so many bytes; null when there is none.
static const Kernels* table_for(int bytes) {
  for (const Kernels* table : tables) {
    if (table->vector_bytes <= bytes && runs_here(table)) return table;
  }
  return nullptr;
}

static const Kernels* kernels = table_for(1 << 20);

namespace {

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

Problem problem_of(const Call& c) {
  const Sizes& s = c.sizes;
  const Kind kind = c.query ? Kind::kda : c.reference ? Kind::fused : Kind::msda;
  return {kind, s.batch, s.tokens, s.heads, s.depth, s.queries, s.levels, s.points, c.shapes.data(),
          array(c.locations), array(c.weights), array(c.reference), c.reference ? c.reference->size(3) : 0,
          c.mask ? static_cast<const bool*>(c.mask->data_ptr()) : nullptr, array(c.query), c.scale};
}

bool is_wide(const Call& c) { return c.value.scalar_type() == ScalarType::Double; }

// Runs f(begin, end, scratch) over the tasks; the memory belongs to the thread.
template <class F>
void run(int64_t tasks, size_t scratch_bytes, F f) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes + 64]);
    f(begin, end, scratch.get());
  });
}

// Rows as the kernels read them; where they are read many times, head by head and without padding.
struct Table {
  std::optional<Tensor> owner;
  Rows rows;
};

Table table_of(const Call& c, const Problem& p, const Tensor& rows) {
  if (!c.sizes.dense()) return {rows, {array(rows), false}};
  const Sizes& s = c.sizes;
  Tensor packed = make(rows, {s.batch, s.heads, s.tokens + 1, s.depth}, working_type(c));
  torch::stable::parallel_for(0, s.batch * (s.tokens + 1), 256, [&](int64_t begin, int64_t end) {
    kernels->pack(p, array(rows), array(packed), begin, end);
  });
  return {packed, {array(packed), true}};
}

Table table_of(const Call& c, const Problem& p, const MaybeTensor& rows) {
  return rows ? table_of(c, p, *rows) : Table{};
}

// How a gradient of the rows is added up in `rows`: there where few are read, by a buffer where many are.
Target target_in(const Call& c, Tensor& rows) {
  const bool direct = !c.sizes.dense() && c.value.scalar_type() == working_type(c);
  if (direct) torch::stable::zero_(rows);
  return {array(rows), direct};
}

// rows += share * source [+ second share * second source] at every sample's corners.
Tensor scattered(const Call& c, const Problem& p, const Tensor& source, const Tensor& share,
                 const MaybeTensor& second_source = {}, const MaybeTensor& second_share = {}) {
  Tensor rows = torch::stable::empty_like(c.value);
  const Target target = target_in(c, rows);
  // a head a task where that keeps all threads busy; a level a task where there are more threads than that
  const int64_t slices = p.batch * p.heads, levels = slices >= torch::stable::get_num_threads() ? p.levels : 1;
  const Scatter scatter{array(source), array(share), array(second_source), array(second_share), target, levels};
  run(slices * (p.levels / levels), kernels->scatter_bytes(p, is_wide(c), target.direct),
      [&](int64_t begin, int64_t end, void* scratch) { kernels->scatter(p, scatter, begin, end, scratch); });
  return rows;
}

// The gradients of a query and of the rows that it reads in one sweep, while both are in cache.
Tensor swept(const Call& c, const Problem& p, const Rows& value, const Gradients& gradients) {
  Tensor rows = torch::stable::empty_like(c.value);
  const Target target = target_in(c, rows);
  run(p.batch * p.heads, kernels->sums_bytes(p, is_wide(c), target.direct),
      [&](int64_t begin, int64_t end, void* scratch) {
        kernels->backward_and_scatter(p, value, gradients, target, begin, end, scratch);
      });
  return rows;
}

// Whether all threads are busy, or nearly, with one image and head at a time.
bool heads_go_round(const Problem& p) {
  const int64_t slices = p.batch * p.heads, threads = torch::stable::get_num_threads();
  return slices % threads == 0 || slices >= 4 * threads;
}

}  // namespace

Tensor forward(const Call& c) {
  const Sizes& s = c.sizes;
  Tensor out = make(c.value, {s.batch, s.queries, s.heads * s.depth}, c.value.scalar_type());
  if (s.batch * s.queries * s.heads * s.depth == 0) return out;
  const Problem p = problem_of(c);
  const Table value = table_of(c, p, c.value), key = table_of(c, p, c.key);
  run(s.batch * s.heads * query_blocks(s.queries), kernels->scratch_bytes(p, is_wide(c)),
      [&](int64_t begin, int64_t end, void* scratch) {
        kernels->forward(p, value.rows, key.rows, array(out), begin, end, scratch);
      });
  return out;
}

Grads backward(const Call& c, const Tensor& grad, Needs needs) {
  const Sizes& s = c.sizes;
  const Problem p = problem_of(c);
  const bool fused = p.kind == Kind::fused, kda = p.kind == Kind::kda;
  if (s.empty()) return empty_grads(c, needs);
  const std::vector<int64_t> per_sample{s.batch, s.queries, s.heads, s.samples()};
  const ScalarType working = working_type(c);
  Grads g = make_grads(c, needs);
  const bool own = needs.geometry || needs.reference;  // what belongs to the queries
  const bool at_once = needs.rows && !kda && (own || fused) && heads_go_round(p);
  const bool keep = needs.rows && (fused || kda) && !at_once;
  const Tensor attention = make(c.value, keep ? per_sample : std::vector<int64_t>{0}, working);
  const Tensor key_weight = make(c.value, keep && kda ? per_sample : std::vector<int64_t>{0}, working);
  std::vector<int64_t> pairs = per_sample;
  pairs.push_back(2);
  const Tensor pixels = make(c.value, needs.reference ? pairs : std::vector<int64_t>{0}, working);
  const Gradients out{array(grad),
                      array_if(needs.geometry, g.locations),
                      array_if(needs.geometry && !kda, g.weights),
                      array_if(needs.geometry && kda, g.query),
                      array_if(needs.reference, g.reference),
                      array_if(keep, attention),
                      array_if(keep && kda, key_weight),
                      array_if(needs.reference, pixels)};
  if (at_once) {
    g.value = swept(c, p, table_of(c, p, c.value).rows, out);
  } else if (own || keep) {
    const Table value = table_of(c, p, c.value), key = table_of(c, p, c.key);
    run(s.batch * s.heads * query_blocks(s.queries), kernels->scratch_bytes(p, is_wide(c)),
        [&](int64_t begin, int64_t end, void* scratch) {
          kernels->backward(p, value.rows, key.rows, out, begin, end, scratch);
        });
  }
  if (needs.reference) {
    torch::stable::parallel_for(0, s.batch * s.queries, 16, [&](int64_t begin, int64_t end) {
      kernels->reference(p, out, begin, end);
    });
  }
  if (!needs.rows || at_once) return g;
  if (kda && !c.key) {
    g.value = scattered(c, p, grad, attention, c.query, key_weight);
  } else {
    g.value = scattered(c, p, grad, keep ? attention : *c.weights);
    if (kda) g.key = scattered(c, p, *c.query, key_weight);
  }
  return g;
}

static void check_numbers(const char* name, const Tensor& tensor, int64_t dimensions, ScalarType dtype, const char* wanted) {
  bool right = tensor.dim() == dimensions && tensor.scalar_type() == dtype && tensor.is_cpu();
  if (right) right = tensor.size(dimensions - 1) < 2 || tensor.stride(dimensions - 1) == 1;
  STD_TORCH_CHECK(right, "detrcli_ops: ", name, " must be ", wanted, ", without gaps in a row and on the CPU");
}

static void normalise(const Tensor& rows, const Tensor& scale, const Tensor& shift, const Tensor& out) {
  check_numbers("rows", rows, 2, ScalarType::Byte, "uint8 (H, N)");
  check_numbers("out", out, 2, ScalarType::Float, "float32 (R, M)");
  check_numbers("scale", scale, 1, ScalarType::Float, "float32 (N)");
  check_numbers("shift", shift, 1, ScalarType::Float, "float32 (N)");
  const int64_t height = rows.size(0), width = rows.size(1), room = out.size(1);
  check_shape("scale", scale, {width});
  check_shape("shift", shift, {width});
  STD_TORCH_CHECK(out.size(0) >= height && room >= width, "detrcli_ops: out must be at least ", shape_text(rows), ", got ", shape_text(out));
  const Pixels pixels{static_cast<const uint8_t*>(rows.data_ptr()), static_cast<const float*>(scale.data_ptr()),
                      static_cast<const float*>(shift.data_ptr()), static_cast<float*>(out.data_ptr()),
                      height, width, room, rows.stride(0), out.stride(0)};
  constexpr int64_t worth_a_thread = 1 << 15;
  torch::stable::parallel_for(0, out.size(0), worth_a_thread / (room + 1) + 1,
                              [&](int64_t begin, int64_t end) { kernels->normalise(pixels, begin, end); });
}

// An error here would end the process, for it is thrown while the library is loaded: Python asks for the width and says why.
STABLE_TORCH_LIBRARY_IMPL(detrcli_ops, CPU, m) {
  if (!kernels) return;
  register_operators(m);
  m.impl("normalise", TORCH_BOX(&normalise));
}

}  // namespace detrcli_ops

// Width of the vectors in use, 0 where this processor runs none of the instruction sets that were built; a positive argument
// first narrows them (tests compare instruction sets).
extern "C" __attribute__((visibility("default"))) int detrcli_ops_vector_bytes(int at_most) {
  if (const auto* table = at_most > 0 ? detrcli_ops::table_for(at_most) : nullptr) detrcli_ops::kernels = table;
  return detrcli_ops::kernels ? detrcli_ops::kernels->vector_bytes : 0;
}
