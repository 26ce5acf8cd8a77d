"""Which images come when: a function of (seed, epoch), cut into steps and ranks. No state, so nothing to save."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detrcli.data.annotations import Array

Key = tuple[int, int]  # epoch, index

ORDER, AUGMENT = 0, 1  # what a stream of random numbers is for: (seed, purpose, …)


@dataclass(frozen=True, slots=True)
class EpochSampler:
    """The batches of one rank: a permutation of (seed, epoch), cut into global batches, each cut into ranks.

    The last images that fill no batch are left out; a data set smaller than one batch is one batch.
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    portrait: Array | None = None  # (length,) bool: keep wide and tall pictures apart

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world_size))

    def order(self, epoch: int) -> Array:
        """The images of an epoch, (steps, global batch)."""
        order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.length)
        whole = self.batch_size * self.world_size
        if self.length < whole:
            return np.resize(order, (1, max(self.length, self.world_size)))
        if self.portrait is not None:
            order = _grouped(order, self.portrait[order], whole)
        return order[: len(self) * whole].reshape(len(self), whole)

    def keys(self, epoch: int, start: int) -> list[list[Key]]:
        """This rank's batches of an epoch from step `start` on."""
        mine = self.order(epoch)[start:, self.rank :: self.world_size]
        return [[(epoch, index) for index in batch] for batch in mine.tolist()]


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

    def __len__(self) -> int:
        return len(self._starts())

    def keys(self, epoch: int, start: int) -> list[list[Key]]:
        ends = ((first, min(first + self.batch_size, self.length)) for first in self._starts()[start:])
        return [[(epoch, index) for index in range(first, end)] for first, end in ends]

    def _starts(self) -> range:
        return range(0, self.length, self.batch_size)[self.rank :: self.world_size]
