// What an operator was called with: checked before any memory is touched or asked for, in one line that names the argument.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace detrcli_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shapes = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

struct Sizes {
  int64_t batch, tokens, heads, depth, queries, levels, points;
  int64_t samples() const { return levels * points; }
  bool empty() const { return batch * heads * depth * queries * levels * points == 0; }
  // More samples than tokens: rows are read many times over, so that rearranging them first pays.
  bool dense() const { return queries * samples() >= 2 * tokens; }
};

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  std::string wanted;
  int64_t i = 0;
  for (const int64_t size : expected) {
    same = same && tensor.size(i) == size;
    wanted += (i++ ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, "detrcli_ops: ", name, " must be (", wanted, "), got ", shape_text(tensor));
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& value, bool same_dtype) {
  const ScalarType dtype = tensor.scalar_type();
  const bool known = dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                     dtype == ScalarType::Half;
  STD_TORCH_CHECK(known, "detrcli_ops: ", name, " must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK((dtype == ScalarType::Double) == (value.scalar_type() == ScalarType::Double), "detrcli_ops: ", name,
                  " and value must both be float64 or neither; cast one of them");
  STD_TORCH_CHECK(!same_dtype || dtype == value.scalar_type(), "detrcli_ops: ", name,
                  " and value must have one dtype; cast one of them");
  STD_TORCH_CHECK(tensor.device() == value.device(), "detrcli_ops: ", name, " and value must be on one device; move one of them");
}

// Sizes of a call; locations are (B, Q, M, L, P, 2), whether absolute or offsets.
inline Sizes check_call(const Tensor& value, const Shapes& shapes, const Tensor& locations) {
  STD_TORCH_CHECK(value.dim() == 4, "detrcli_ops: value must be (B, S, M, D), got ", shape_text(value));
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "detrcli_ops: shapes must be height, width for each level, got ", shapes.size(), " numbers");
  STD_TORCH_CHECK(locations.dim() == 6, "detrcli_ops: locations must be (B, Q, M, L, P, 2), got ", shape_text(locations));
  const Sizes sizes{value.size(0), value.size(1), value.size(2), value.size(3),
                    locations.size(1), static_cast<int64_t>(shapes.size() / 2), locations.size(4)};
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 1;
  int64_t tokens = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    STD_TORCH_CHECK(shapes[i] >= 0 && shapes[i + 1] >= 0, "detrcli_ops: level shapes must not be negative, got ", shapes[i], " x ", shapes[i + 1]);
    STD_TORCH_CHECK(shapes[i] <= most && shapes[i + 1] <= most && shapes[i] * shapes[i + 1] <= most - tokens,
                    "detrcli_ops: all levels together must have fewer than 2^31 tokens; split the picture");
    tokens += shapes[i] * shapes[i + 1];
  }
  STD_TORCH_CHECK(tokens == sizes.tokens, "detrcli_ops: value has ", sizes.tokens, " tokens but the levels have ", tokens);
  check_like("value", value, value, true);
  check_shape("locations", locations, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2});
  check_like("locations", locations, value, false);
  return sizes;
}

inline void check_reference(const Sizes& sizes, const Tensor& reference, const Tensor& value) {
  const int64_t width = reference.dim() == 4 ? reference.size(3) : 0;
  STD_TORCH_CHECK(width == 2 || width == 4, "detrcli_ops: reference must be (B, Q, L, 2) or (B, Q, L, 4), got ", shape_text(reference));
  check_shape("reference", reference, {sizes.batch, sizes.queries, sizes.levels, width});
  check_like("reference", reference, value, false);
}

inline void check_mask(const Sizes& sizes, const MaybeTensor& mask, const Tensor& value) {
  if (!mask) return;
  check_shape("mask", *mask, {sizes.batch, sizes.tokens});
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "detrcli_ops: mask must be bool, true on padding");
  STD_TORCH_CHECK(mask->device() == value.device(), "detrcli_ops: mask and value must be on one device; move one of them");
}

// Everything that the operators take; absent tensors stay empty.
struct Call {
  Sizes sizes;
  Tensor value;
  MaybeTensor key, query, reference, weights, mask;
  Tensor locations;
  Shapes shapes;
  double scale = 1;
};

inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
inline MaybeTensor dense(const MaybeTensor& tensor) { return tensor ? MaybeTensor(dense(*tensor)) : tensor; }

inline Call msda_call(const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes s = check_call(value, shapes, locations);
  check_shape("weights", weights, {s.batch, s.queries, s.heads, s.levels, s.points});
  check_like("weights", weights, value, false);
  return {s, dense(value), {}, {}, {}, dense(weights), {}, dense(locations), shapes};
}

inline Call fused_call(const Tensor& value, const Shapes& shapes, const Tensor& reference, const Tensor& offsets,
                       const Tensor& logits, const MaybeTensor& mask) {
  const Sizes s = check_call(value, shapes, offsets);
  check_reference(s, reference, value);
  check_shape("logits", logits, {s.batch, s.queries, s.heads, s.samples()});
  check_like("logits", logits, value, false);
  check_mask(s, mask, value);
  return {s, dense(value), {}, {}, dense(reference), dense(logits), dense(mask), dense(offsets), shapes};
}

inline Call kda_call(const Tensor& query, const MaybeTensor& key, const Tensor& value, const Shapes& shapes,
                     const Tensor& reference, const Tensor& offsets, const MaybeTensor& mask, double scale) {
  const Sizes s = check_call(value, shapes, offsets);
  check_shape("query", query, {s.batch, s.queries, s.heads, s.depth});
  check_like("query", query, value, true);
  if (key) {
    check_shape("key", *key, {s.batch, s.tokens, s.heads, s.depth});
    check_like("key", *key, value, true);
  }
  check_reference(s, reference, value);
  check_mask(s, mask, value);
  return {s, dense(value), dense(key), dense(query), dense(reference), {}, dense(mask), dense(offsets), shapes, scale};
}

inline Tensor check_grad(const Call& call, const Tensor& grad) {
  const Sizes& s = call.sizes;
  check_shape("grad", grad, {s.batch, s.queries, s.heads * s.depth});
  check_like("grad", grad, call.value, true);
  return dense(grad);
}

inline ScalarType working_type(const Call& call) {
  return call.value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor make_zeros(const Tensor& like, ScalarType dtype) {
  Tensor zeros = make(like, like.sizes().vec(), dtype);
  torch::stable::zero_(zeros);
  return zeros;
}

// A gradient that nobody asked for has no elements.
inline Tensor none(const Tensor& like) { return make(like, {0}, like.scalar_type()); }

inline Tensor wanted(bool need, const Tensor& like) { return need ? torch::stable::empty_like(like) : none(like); }

inline Tensor zero_or_none(bool need, const Tensor& like) { return need ? make_zeros(like, like.scalar_type()) : none(like); }

struct Needs {
  bool rows, geometry, reference, deterministic;
};

struct Grads {
  Tensor value, key, query, reference, locations, weights;
};

// The gradients of a call, to be written; those of rows are made by who sums them.
inline Grads make_grads(const Call& c, Needs needs) {
  return {none(c.value),
          none(c.value),
          wanted(needs.geometry && c.query, c.query ? *c.query : c.value),
          wanted(needs.reference, c.reference ? *c.reference : c.value),
          wanted(needs.geometry, c.locations),
          wanted(needs.geometry && c.weights, c.weights ? *c.weights : c.value)};
}

// The gradients of a call whose answer depends on nothing.
inline Grads empty_grads(const Call& c, Needs needs) {
  return {zero_or_none(needs.rows, c.value),
          zero_or_none(needs.rows && c.key, c.key ? *c.key : c.value),
          zero_or_none(needs.geometry && c.query, c.query ? *c.query : c.value),
          zero_or_none(needs.reference, c.reference ? *c.reference : c.value),
          zero_or_none(needs.geometry, c.locations),
          zero_or_none(needs.geometry && c.weights, c.weights ? *c.weights : c.value)};
}

}  // namespace detrcli_ops
