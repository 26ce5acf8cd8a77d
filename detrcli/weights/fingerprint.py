"""A few numbers that a model answers to a fixed picture: the same weights give the same ones on every machine, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detrcli.plugins.contract import Preprocess
from detrcli.types import Output

TOLERANCE = 1e-3  # of values around one; kernels of other machines differ by some 1e-5
_LONGEST = 256  # pixels: enough to tell models apart, quick for all of them
_VALUES = 8  # of logits, and as many of boxes


def fingerprint(module: nn.Module, preprocess: Preprocess) -> list[float]:
    """Means, spreads and best scores over queries: they do not depend on the order of queries."""
    side = min(_LONGEST, preprocess.short_side)
    training = module.training
    with torch.inference_mode():
        output: Output = module.eval()(picture(side, side * 5 // 4))
    module.train(training)
    return _summary(output.logits[0].sigmoid()) + _summary(output.boxes[0])


def picture(height: int, width: int) -> Tensor:
    """(1, 3, H, W): smooth waves, the same everywhere, as they need no random numbers."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    waves = [(math.tau * (f * y + (4 - f) * x)).sin() + (math.tau * 3 * f * x * y).cos() for f in (1, 2, 3)]
    return torch.stack(waves)[None]


def differs(now: Sequence[float], before: Sequence[float]) -> bool:
    return len(now) != len(before) or any(
        not abs(a - b) <= TOLERANCE for a, b in zip(now, before, strict=True)
    )


def _summary(values: Tensor) -> list[float]:
    """values (Q, N) in [0, 1] -> eight numbers."""
    values = values.double()
    spread = values.std(0).mean() if len(values) > 1 else values.new_zeros(())
    best = values.amax(1).sort(descending=True).values
    chosen = best[torch.linspace(0, len(best) - 1, _VALUES - 3).long()]
    numbers = [values.mean(), spread, values.pow(2).mean(), *chosen]
    return [round(float(number), 6) for number in numbers]
