"""Calls the operators with arguments that are odd in every way, forward and backward, in each instruction set built.

    python -m tests.ops.fuzz_arguments CALLS

What comes out is compared elsewhere: this is run under sanitizers, and they judge.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import detrcli_ops
from detrcli import ops
from tests.ops.cases import KINDS, Case, make_case

ROWS = ("value", "key", "query")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HUGE = 3e38  # infinite in float16
ODD = (math.nan, math.inf, -math.inf, HUGE, -HUGE, 1e9, -1e9, 2.0**31, 1e-45, -0.0, -0.5, 0.5)


def drawn(rng: random.Random) -> Case:
    """Any number of levels of any size, empty ones too; one query on many tokens or the reverse."""
    case = make_case(
        rng.choice(KINDS),
        batch=rng.choice([0, 1, 1, 2, 3]),
        queries=rng.choice([0, 1, 2, 7, 65, 130]),
        heads=rng.choice([1, 2, 3]),
        depth=rng.choice([0, 1, 3, 8, 16, 30, 32, 65]),
        points=rng.choice([0, 1, 2, 3, 4, 5, 17, 67]),
        shapes=[(rng.choice([0, 1, 2, 5, 9]), rng.choice([0, 1, 2, 5, 9])) for _ in range(rng.randint(0, 4))],
        box=rng.random() < 0.5,
        masked=rng.random() < 0.5,
        seed=rng.randint(0, 1 << 30),
    )
    dtype = rng.choice(DTYPES)
    geometry = rng.choice([dtype] if dtype == torch.float64 else DTYPES[1:])
    changed = {name: t.to(dtype if name in ROWS else geometry) for name, t in case.floats().items()}
    return Case(case.kind, case.shapes, case.tensors | changed)


def spoiled(tensor: Tensor, rng: random.Random) -> Tensor:
    """Some elements, or none, replaced by what no model should compute."""
    flat = tensor.flatten()
    for _ in range(rng.choice([0, 0, 1, 9]) if flat.numel() else 0):
        flat[rng.randrange(flat.numel())] = rng.choice(ODD)
    return flat.view(tensor.shape)


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (as_it_is, as_it_is, strided, misaligned, expanded)


def call(rng: random.Random) -> None:
    case = drawn(rng)
    leaves = {
        name: rng.choice(LAYOUTS)(spoiled(tensor, rng)).requires_grad_(rng.random() < 0.7)
        for name, tensor in case.floats().items()
    }
    out = case("native", **leaves)
    assert out.dtype == leaves["value"].dtype
    if out.requires_grad:
        out.backward(rng.choice(LAYOUTS)(spoiled(torch.ones_like(out), rng)))


def prepare(rng: random.Random) -> None:
    """A picture anywhere in memory, with any room around it."""
    height, width, below, right = (rng.choice([0, 1, 2, 15, 16, 17, 33, 100]) for _ in range(4))
    rows = rng.choice([as_it_is, misaligned])(torch.zeros(height, width, dtype=torch.uint8))
    out = rng.choice([as_it_is, misaligned])(torch.empty(height + below, width + right))
    ops.normalise(rows, torch.ones(width), torch.ones(width), out, form="native")


def main() -> None:
    calls = int(sys.argv[1])
    best = detrcli_ops.isa()
    names = [best] if best == "native" else [name for name in ("sse4", best) if detrcli_ops.use_isa(name)]
    for name in names:
        rng = random.Random(0)
        for index in range(calls):
            torch.set_num_threads(1 + index % 3)
            call(rng)
            prepare(rng)
        print(f"{calls} calls of {name} in {detrcli_ops.__file__}")


if __name__ == "__main__":
    main()
