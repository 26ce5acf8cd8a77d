// The operators on CUDA.
//
// A group of lanes of one warp serves one query and head; each lane owns a few channels, read as one 16-byte word. The
// geometry of a sample is computed once, by one lane, and handed round by shuffles. Blocks walk tiles of queries of one
// head, two-dimensional tiles where the queries are the tokens, so that what neighbours read stays in L1.
#include "../operators.h"
#include "deterministic.cuh"
#include "forward.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

namespace detrcli_ops {
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

constexpr int kMost = 4;  // largest numbers that the bound is made of: of gradient, weights, value, query

FixedPoint* fixed_of(const Tensor& most) { return reinterpret_cast<FixedPoint*>(static_cast<double*>(most.data_ptr()) + kMost); }

// A bound of all addends of the scattered gradients, on the device, behind what it was made of.
Tensor bound_of(const Call& c, const Tensor& grad, cudaStream_t stream) {
  Tensor most = make(c.value, {kMost + sizeof(FixedPoint) / sizeof(double)}, ScalarType::Double);
  torch::stable::zero_(most);
  auto* slots = static_cast<double*>(most.data_ptr());
  const auto largest = [&](const Tensor& tensor, int slot, const bool* mask = nullptr) {
    auto* kernel = dtype_of(tensor) == Dtype::f64 ? largest_kernel<double> : largest_kernel<float>;
    kernel<<<std::min(blocks_for(tensor.numel()), 1024), kThreads, 0, stream>>>(
        array(tensor), tensor.numel(), mask, c.sizes.heads * c.sizes.depth, reinterpret_cast<unsigned long long*>(slots + slot));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  largest(grad, 0);
  if (c.weights) largest(*c.weights, 1);
  if (c.query) {
    largest(*c.query, 3);
    largest(c.value, 2, c.mask ? static_cast<const bool*>(c.mask->data_ptr()) : nullptr);
  }
  bound_kernel<<<1, 1, 0, stream>>>(slots, bool(c.query), c.reference && !c.query, c.query && !c.key,
                                    static_cast<int>(c.sizes.depth), c.scale, fixed_of(most));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return most;
}

// The buffer of a scattered gradient as the caller's dtype.
Tensor finished(const Call& c, const Problem& p, const Tensor& buffer, const FixedPoint* fixed, cudaStream_t stream) {
  if (!fixed) return buffer.scalar_type() == c.value.scalar_type() ? buffer : torch::stable::to(buffer, c.value.scalar_type());
  Tensor out = torch::stable::empty_like(c.value);
  with_dtype(c.value, [&](auto element) {
    using T = decltype(element);
    unfix_kernel<T><<<blocks_for(out.numel()), kThreads, 0, stream>>>(
        p, static_cast<const long long*>(buffer.data_ptr()), static_cast<T*>(out.data_ptr()), out.numel(), fixed);
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
  FixedPoint* fixed = most ? fixed_of(*most) : nullptr;
  Outputs o{array(grad),
            array_if(needs.geometry && kda, g.query),
            array_if(needs.geometry, g.locations),
            array_if(needs.geometry && !kda, g.weights),
            array_if(needs.geometry && fused, raw),
            array_if(needs.reference, pixels),
            array_if(needs.rows, d_value),
            array_if(needs.rows && c.key, d_key),
            fixed,
            0};
  with_dtype(c.value, [&](auto element) {
    using T = decltype(element);
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    if (needs.rows && !fixed && !c.key) o.shared_elements = share_levels(p, sizeof(A));
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
  if (needs.rows) g.value = finished(c, p, d_value, fixed, stream);
  if (needs.rows && c.key) g.key = finished(c, p, d_key, fixed, stream);
  return g;
}

STABLE_TORCH_LIBRARY_IMPL(detrcli_ops, CUDA, m) { register_operators(m); }

}  // namespace detrcli_ops
