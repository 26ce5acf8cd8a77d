// Boxed operators of one device, from its two functions `forward(Call)` and `backward(Call, grad, Needs)`.
#pragma once

#include "arguments.h"

#include <tuple>

namespace detrcli_ops {

Tensor forward(const Call& call);
Grads backward(const Call& call, const Tensor& grad, Needs needs);

inline Tensor msda(const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  return forward(msda_call(value, shapes, locations, weights));
}

inline std::tuple<Tensor, Tensor, Tensor> msda_backward(const Tensor& grad, const Tensor& value, const Shapes& shapes,
                                                        const Tensor& locations, const Tensor& weights, bool need_rows,
                                                        bool need_geometry, bool deterministic) {
  const Call call = msda_call(value, shapes, locations, weights);
  const Grads g = backward(call, check_grad(call, grad), {need_rows, need_geometry, false, deterministic});
  return {g.value, g.locations, g.weights};
}

inline Tensor msda_fused(const Tensor& value, const Shapes& shapes, const Tensor& reference, const Tensor& offsets,
                         const Tensor& logits, const MaybeTensor& mask) {
  return forward(fused_call(value, shapes, reference, offsets, logits, mask));
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> msda_fused_backward(
    const Tensor& grad, const Tensor& value, const Shapes& shapes, const Tensor& reference, const Tensor& offsets,
    const Tensor& logits, const MaybeTensor& mask, bool need_rows, bool need_geometry, bool need_reference, bool deterministic) {
  const Call call = fused_call(value, shapes, reference, offsets, logits, mask);
  const Grads g = backward(call, check_grad(call, grad), {need_rows, need_geometry, need_reference, deterministic});
  return {g.value, g.reference, g.locations, g.weights};
}

inline Tensor kda(const Tensor& query, const MaybeTensor& key, const Tensor& value, const Shapes& shapes,
                  const Tensor& reference, const Tensor& offsets, const MaybeTensor& mask, double scale) {
  return forward(kda_call(query, key, value, shapes, reference, offsets, mask, scale));
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kda_backward(
    const Tensor& grad, const Tensor& query, const MaybeTensor& key, const Tensor& value, const Shapes& shapes,
    const Tensor& reference, const Tensor& offsets, const MaybeTensor& mask, double scale, bool need_rows,
    bool need_geometry, bool need_reference, bool deterministic) {
  const Call call = kda_call(query, key, value, shapes, reference, offsets, mask, scale);
  const Grads g = backward(call, check_grad(call, grad), {need_rows, need_geometry, need_reference, deterministic});
  return {g.query, g.key, g.value, g.reference, g.locations};
}

inline void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("msda", TORCH_BOX(&msda));
  m.impl("msda_backward", TORCH_BOX(&msda_backward));
  m.impl("msda_fused", TORCH_BOX(&msda_fused));
  m.impl("msda_fused_backward", TORCH_BOX(&msda_fused_backward));
  m.impl("kda", TORCH_BOX(&kda));
  m.impl("kda_backward", TORCH_BOX(&kda_backward));
}

}  // namespace detrcli_ops
