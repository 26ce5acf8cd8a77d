"""Inputs of any size for the operators, and calls that treat the three operators alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detrcli import ops

SHAPES = ((6, 5), (3, 4), (2, 1))
KINDS = ("msda", "msda_fused", "kda", "kda_separate_key")


@dataclass(frozen=True)
class Case:
    """One call: the operator's name, its tensors by name (None where absent), and the level shapes."""

    kind: str
    shapes: tuple[tuple[int, int], ...]
    tensors: dict[str, Tensor | None]

    def __call__(self, form: ops.Mode | None = None, **changed: Tensor | None) -> Tensor:
        t = self.tensors | changed
        if self.kind == "msda":
            return ops.msda(t["value"], self.shapes, t["locations"], t["weights"], form=form)
        if self.kind == "msda_fused":
            args = (t["reference"], t["offsets"], t["logits"], t["mask"])
            return ops.msda_fused(t["value"], self.shapes, *args, form=form)
        key = t["value"] if self.kind == "kda" else t["key"]
        args = (t["reference"], t["offsets"], t["mask"])
        return ops.kda(t["query"], key, t["value"], self.shapes, *args, form=form)

    def floats(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.tensors.items() if t is not None and t.is_floating_point()}

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        floats = {name: change(tensor) for name, tensor in self.floats().items()}
        return replace(self, tensors=self.tensors | floats)

    def to(self, dtype: torch.dtype) -> Case:
        """Rows in this dtype; geometry too, except that 16-bit rows go with float32 geometry."""
        rows = ("value", "key", "query")
        geometry = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        changed = {n: t.to(dtype if n in rows else geometry) for n, t in self.floats().items()}
        return replace(self, tensors=self.tensors | changed)

    def gradients(self, form: ops.Mode, grad: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer and the gradient by every float input."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.floats().items()}
        out = self(form, **leaves)
        if grad is None:
            generator = torch.Generator().manual_seed(1)
            grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        if out.requires_grad:  # with nothing to sample, plain torch leaves the answer unconnected
            out.backward(grad)
        return out.detach(), {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def make_case(
    kind: str,
    *,
    batch: int = 2,
    queries: int = 7,
    heads: int = 2,
    depth: int = 8,
    points: int = 3,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    box: bool = False,
    masked: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """A random float64 case with samples inside, across the border and far outside."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64).to(device)

    shapes = tuple(shapes)
    levels, tokens = len(shapes), sum(h * w for h, w in shapes)
    per_sample = (batch, queries, heads, levels, points)
    tensors: dict[str, Tensor | None] = {"value": normal(batch, tokens, heads, depth)}
    if kind == "msda":
        tensors["locations"] = uniform(*per_sample, 2) * 1.6 - 0.3
        tensors["weights"] = normal(*per_sample)
        return Case(kind, shapes, tensors)
    centre = uniform(batch, queries, levels, 2) * 1.2 - 0.1
    size = uniform(batch, queries, levels, 2) * 0.8 + 0.1
    tensors["reference"] = torch.cat([centre, size], -1) if box else centre
    tensors["offsets"] = normal(*per_sample, 2) * 1.5
    tensors["mask"] = uniform(batch, tokens) < 0.25 if masked else None
    if kind == "msda_fused":
        tensors["logits"] = normal(batch, queries, heads, levels * points)
    else:
        tensors["query"] = normal(batch, queries, heads, depth)
    if kind == "kda_separate_key":
        tensors["key"] = normal(batch, tokens, heads, depth)
    return Case(kind, shapes, tensors)
