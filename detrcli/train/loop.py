"""The training step, and nothing around it: forward, loss, backward, clip, step.

Randomness is counter-based: dropout in step k is a function of (seed, k), as the order and augmentation of the data are of
(seed, epoch, image). So a run can stop and go on anywhere, to the bit, with no generator's state to keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from detrcli import distributed
from detrcli.errors import NonFiniteError
from detrcli.plugins.contract import Recipe
from detrcli.train.optim import set_rate
from detrcli.types import Batch, Criterion, Losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One finished step: what a progress line and a metrics file show."""

    number: int  # from 0, over all epochs
    epoch: int
    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A model with what it takes to improve it by one batch."""

    model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    device: str
    seed: int
    bf16: bool
    takes_targets: bool

    def step(self, batches: Sequence[Batch], number: int, epoch: int, share: float) -> Step:
        """One optimiser step over the micro-batches of one batch, normalised by the objects of all of them."""
        torch.manual_seed(_mix(self.seed, number, distributed.rank()))
        set_rate(self.optimizer, self.recipe, share)
        self.optimizer.zero_grad(set_to_none=True)
        objects = sum(len(t.labels) for b in batches for t in b.targets)
        parts = len(batches)
        num_boxes = distributed.mean_over_ranks(objects / parts, torch.device(self.device)).item()
        done = [self._backward(batch.to(self.device), num_boxes, parts, number) for batch in batches]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of step {number} is not finite; the weights are as before it", hint=_CALM
            )
        self.optimizer.step()
        means = {name: sum(values[name] for values in done) / parts for name in done[0]}
        return Step(
            number=number,
            epoch=epoch,
            loss=means.pop("total"),
            terms=means,
            lr=self.recipe.lr * share,
            grad_norm=float(norm),
        )

    def _backward(self, batch: Batch, num_boxes: float, parts: int, number: int) -> dict[str, float]:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            extra = (batch.targets,) if self.takes_targets else ()
            output = self.model(batch.images, batch.mask, *extra)
        losses = self.criterion(output, batch.targets, num_boxes)
        values = _numbers(losses)
        if not math.isfinite(values["total"]):
            raise _diagnosis(values, batch, number)
        (losses.total / parts).backward()  # type: ignore[no-untyped-call]
        return values


_CALM = "lower the learning rate (--lr), or train in float32 (--amp off)"


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three counters; the factors keep neighbours apart."""
    return (seed * 1_000_003 + step * 65_537 + rank * 257) % 2**63


def _numbers(losses: Losses) -> dict[str, float]:
    """The total and its terms on the host, in one copy."""
    values = torch.stack([losses.total.detach(), *losses.terms.values()]).tolist()
    return dict(zip(("total", *losses.terms), values, strict=True))


def _diagnosis(values: dict[str, float], batch: Batch, number: int) -> NonFiniteError:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return NonFiniteError(
        f"the loss of step {number} is not finite (terms: {', '.join(bad)}; pictures: "
        f"{', '.join(map(str, batch.image_ids))}); the weights are as before it",
        hint=_CALM,
    )
