// The operators' schemas. Shapes are ints, height and width of each level; a gradient that is not needed comes back empty.
// The CPU is deterministic whatever `deterministic` says.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(detrcli_ops, m) {
  m.def("msda(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "msda_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights, bool need_rows, "
      "bool need_geometry, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "msda_fused(Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets, Tensor logits, Tensor? mask) -> "
      "Tensor");
  m.def(
      "msda_fused_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets, Tensor logits, "
      "Tensor? mask, bool need_rows, bool need_geometry, bool need_reference, bool deterministic) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "kda(Tensor query, Tensor? key, Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets, Tensor? mask, "
      "float scale) -> Tensor");
  m.def(
      "kda_backward(Tensor grad, Tensor query, Tensor? key, Tensor value, SymInt[] shapes, Tensor reference, Tensor "
      "offsets, Tensor? mask, float scale, bool need_rows, bool need_geometry, bool need_reference, bool "
      "deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // out (R, M) = rows (H, N) of bytes * scale (N) + shift (N), zero on the right and below; CPU only
  m.def("normalise(Tensor rows, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
}
