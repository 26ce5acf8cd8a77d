"""Which images come when: a function of (seed, epoch), cut into steps and ranks. No state, so nothing to save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from detrcli.data.annotations import Array

Key = tuple[int, int]  # epoch, index

ORDER, AUGMENT = 0, 1  # what a stream of random numbers is for: (seed, purpose, …)


@dataclass(frozen=True, slots=True)
class EpochSampler:
    """The batches of one rank: a permutation of (seed, epoch), cut into steps, each cut into ranks, and those into parts.

    Which images a step sees depends on its size alone, not on how many ranks and parts share it: the same steps come on
    one GPU and on eight. The last images that fill no step are left out; a data set smaller than one step is one step.
    """

    length: int
    batch_size: int  # of one part of one rank
    seed: int
    rank: int = 0
    world_size: int = 1
    portrait: Array | None = None  # (length,) bool: keep wide and tall pictures apart
    parts: int = 1  # batches that a step accumulates

    @property
    def whole(self) -> int:
        """Images of a step."""
        return self.batch_size * self.world_size * self.parts

    def __len__(self) -> int:
        return max(1, self.length // self.whole)

    def order(self, epoch: int) -> Array:
        """The images of an epoch, (steps, images of a step); a small data set repeats some so that no rank is left idle."""
        order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.length)
        if self.length < self.whole:
            return np.resize(order, (1, math.ceil(self.length / self.world_size) * self.world_size))
        if self.portrait is not None:
            order = _grouped(order, self.portrait[order], self.whole)
        return order[: len(self) * self.whole].reshape(len(self), self.whole)

    def keys(self, epoch: int, start: int) -> list[list[Key]]:
        """This rank's batches of an epoch from step `start` on, the parts of a step one after the other."""
        mine = self.order(epoch)[start:, self.rank :: self.world_size].tolist()
        cuts = range(0, len(mine[0]) if mine else 0, self.batch_size)
        return [[(epoch, i) for i in step[cut : cut + self.batch_size]] for step in mine for cut in cuts]

    @property
    def batches_a_step(self) -> int:
        share = min(self.batch_size * self.parts, math.ceil(self.length / self.world_size))
        return math.ceil(share / self.batch_size)


def _grouped(order: Array, portrait: Array, whole: int) -> Array:
    """The order with whole batches of one orientation, first come, first served; what is left over comes last."""
    waiting: dict[bool, list[int]] = {False: [], True: []}
    grouped: list[int] = []
    for index, upright in zip(order.tolist(), portrait.tolist(), strict=True):
        queue = waiting[upright]
        queue.append(index)
        if len(queue) == whole:
            grouped += queue
            queue.clear()
    return np.array(grouped + waiting[False] + waiting[True], np.int64)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of an evaluation: every image once over all ranks, none repeated to even out.

    Whole batches are dealt out, so that an image has the same neighbours, and the same padding, whatever the number of ranks.
    """

    length: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    batches_a_step: ClassVar[int] = 1

    def __len__(self) -> int:
        return len(self._starts())

    def keys(self, epoch: int, start: int) -> list[list[Key]]:
        ends = ((first, min(first + self.batch_size, self.length)) for first in self._starts()[start:])
        return [[(epoch, index) for index in range(first, end)] for first, end in ends]

    def _starts(self) -> range:
        return range(0, self.length, self.batch_size)[self.rank :: self.world_size]
