"""The training step, and nothing around it: forward, loss, backward, clip, step.

Randomness is counter-based: dropout in step k is a function of (seed, k), as the order and augmentation of the data are of
(seed, epoch, image). So a run can stop and go on anywhere, to the bit, with no generator's state to keep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from detrcli import distributed
from detrcli.errors import NonFiniteError
from detrcli.nn.criterion import at_least_float32
from detrcli.plugins.contract import Recipe
from detrcli.train.ema import Average
from detrcli.train.guard import Ways, diagnosis, explained
from detrcli.train.learner import Shared
from detrcli.train.optim import set_rate
from detrcli.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One finished step: what a progress line and a metrics file show. Losses are means over all ranks."""

    number: int  # from 0, over all epochs
    epoch: int
    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float
    seconds: float  # from asking for its data to its end
    waited: float  # of these, for the data


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A model with what it takes to improve it by one batch."""

    net: nn.Module
    learner: Shared
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    device: str
    seed: int
    scaler: torch.amp.GradScaler  # for fp16; does nothing otherwise
    average: Average | None = None
    ways: Ways = field(default_factory=Ways)

    def step(
        self, batches: Sequence[Batch], number: int, epoch: int, share: float, waited: float = 0.0
    ) -> Step:
        """One optimiser step over the micro-batches of one batch, normalised by the objects of all of them."""
        started = time.perf_counter()
        torch.manual_seed(_mix(self.seed, number, distributed.rank()))
        set_rate(self.optimizer, self.recipe, share)
        self.optimizer.zero_grad(set_to_none=True)
        lr = self.recipe.lr * share
        with explained(batches, self.device, number, lr, self.ways):
            values, norm = self._backward(batches)
        if not all(map(math.isfinite, values.values())) or not (math.isfinite(norm) or self._may_overflow()):
            raise diagnosis(values, norm, batches, number, lr, self.ways)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.net)
        return Step(
            number=number,
            epoch=epoch,
            loss=values.pop("total"),
            terms=values,
            lr=lr,
            grad_norm=norm,
            seconds=waited + time.perf_counter() - started,
            waited=waited,
        )

    def _may_overflow(self) -> bool:
        """Whether it may be the scale that makes a gradient infinite, and a lower one help; below 1 it makes them smaller."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def _backward(self, batches: Sequence[Batch]) -> tuple[dict[str, float], float]:
        """Gradients of all parts, clipped; the mean losses over parts and ranks, and the norm, in one copy to the host."""
        parts, device = len(batches), torch.device(self.device)
        objects = sum(len(t.labels) for b in batches for t in b.targets)
        of_rank = distributed.mean_number(objects, device)
        num_boxes = max(of_rank, 1 / distributed.world_size()) / parts  # at least one in the whole batch
        done = [self._part(b, num_boxes, parts, last=b is batches[-1]) for b in batches]
        self.learner.warm = True
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_norm)
        means = torch.stack([torch.stack(list(losses.values())) for losses in done]).mean(0)
        *values, gradient = torch.cat([distributed.average(means), norm[None].to(means)]).tolist()
        return dict(zip(done[0], values, strict=True)), gradient

    def _part(self, batch: Batch, num_boxes: float, parts: int, *, last: bool) -> dict[str, Tensor]:
        with self.learner.unsynchronised(last):
            try:
                losses = self.learner(batch.to(self.device), num_boxes)
            except NonFiniteError as error:  # of the matcher, which does not know the pictures
                raise NonFiniteError(
                    f"{error.message} (pictures: {', '.join(map(str, batch.image_ids))})", hint=error.hint
                ) from error
            self.scaler.scale(losses["total"] / parts).backward()  # type: ignore[no-untyped-call]
        return {name: at_least_float32(value.detach()) for name, value in losses.items()}


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three counters; the factors keep neighbours apart."""
    return (seed * 1_000_003 + step * 65_537 + rank * 257) % 2**63
