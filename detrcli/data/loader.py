"""From a `Dataset` to batches, in an order that is a function of (seed, epoch) alone.

Nothing here holds a state that a checkpoint would have to save: batch k of epoch e is always the same, whatever the
number of workers, and with N ranks the global batch is cut into N parts. Resuming is `loader.epoch(e, start=k)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from detrcli.data.annotations import Array, Dataset
from detrcli.data.masks import masks_of
from detrcli.data.transforms import Size, Transform, View, evaluation, normalise, target_of, view_of
from detrcli.plugins.contract import Preprocess
from detrcli.types import Batch, Sample, Target

Key = tuple[int, int]  # epoch, index

_ORDER, _AUGMENT = 0, 1  # what a stream of random numbers is for


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad the pictures at the bottom and on the right to the largest height and width."""
    images, mask = _canvas([(s.image.shape[1], s.image.shape[2]) for s in samples], shared=False)
    for image, sample in zip(images, samples, strict=True):
        image[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    return Batch(
        images,
        mask,
        tuple(_pad_masks(s.target, images) for s in samples),
        tuple(s.image_id for s in samples),
        torch.tensor([s.original_size for s in samples]),
    )


def _canvas(sizes: Sequence[Size], *, shared: bool) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), zero where padded and unset elsewhere, and the mask of the padding (B, H, W)."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    shape = (len(sizes), 3, height, width)
    images = _shared(shape) if shared else torch.empty(shape)
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, padding, (h, w) in zip(images, mask, sizes, strict=True):
        image[:, h:] = 0
        image[:, :h, w:] = 0
        padding[:h, :w] = False
    return images, mask


def _shared(shape: tuple[int, ...]) -> Tensor:
    """A float tensor in shared memory from the start, so that a worker hands it over without a copy."""
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0).set_(storage).view(shape)


def _pad_masks(target: Target, images: Tensor) -> Target:
    if "masks" not in target.extras:
        return target
    masks = target.extras["masks"]
    padded = masks.new_zeros(len(masks), *images.shape[-2:])
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return dataclasses.replace(target, extras={**target.extras, "masks": padded})


@dataclass(frozen=True, slots=True)
class Samples(TorchDataset[Batch]):
    """What a worker process holds: a list of keys becomes a batch. Pictures stay uint8 until they are normalised
    straight into their place in the batch."""

    dataset: Dataset
    transform: Transform
    seed: int

    def __getitem__(self, keys: list[Key]) -> Batch:
        annotations, preprocess = self.dataset.annotations, self.transform.preprocess
        views, originals = zip(*(self.view(*key) for key in keys), strict=True)
        images, mask = _canvas([v.size for v in views], shared=get_worker_info() is not None)
        for image, view in zip(images, views, strict=True):
            normalise(view.pixels, preprocess, image[:, : view.size[0], : view.size[1]])
        return Batch(
            images,
            mask,
            tuple(_pad_masks(target_of(view), images) for view in views),
            tuple(int(annotations.image_ids[index]) for _, index in keys),
            torch.tensor(originals),
        )

    def view(self, epoch: int, index: int) -> tuple[View, Size]:
        """The transformed picture, uint8, and its original size."""
        annotations = self.dataset.annotations
        pixels, objects = self.dataset.picture(index), annotations.objects(index)
        original = (pixels.shape[1], pixels.shape[2])
        view = view_of(pixels, objects, masks_of(annotations, objects, original))
        return self.transform(view, np.random.default_rng([self.seed, _AUGMENT, epoch, index])), original


class EpochSampler(Sampler[list[Key]]):
    """The batches of one rank in epoch `at[0]` from step `at[1]` on: a permutation of (seed, epoch), cut into global
    batches, each cut into ranks. The last images that fill no batch are left out; a data set smaller than one batch is
    one batch."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        portrait: Array | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.portrait = rank, world_size, portrait
        self.at: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world_size))

    def order(self, epoch: int) -> Array:
        """The images of an epoch, (steps, global batch)."""
        order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.length)
        whole = self.batch_size * self.world_size
        if self.length < whole:
            return np.resize(order, (1, max(self.length, self.world_size)))
        if self.portrait is not None:
            order = _grouped(order, self.portrait[order], whole)
        return order[: len(self) * whole].reshape(len(self), whole)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start = self.at
        for images in self.order(epoch)[start:]:
            yield [(epoch, int(i)) for i in images[self.rank :: self.world_size]]


def _grouped(order: Array, portrait: Array, whole: int) -> Array:
    """The order with whole batches of one orientation first come, first served; what is left over comes last."""
    waiting: dict[bool, list[int]] = {False: [], True: []}
    grouped: list[int] = []
    for index, upright in zip(order.tolist(), portrait.tolist(), strict=True):
        queue = waiting[upright]
        queue.append(index)
        if len(queue) == whole:
            grouped += queue
            queue.clear()
    return np.array(grouped + waiting[False] + waiting[True], np.int64)


class TrainLoader:
    """Batches of any epoch from any step; the workers stay alive between epochs."""

    def __init__(self, loader: DataLoader[Batch], sampler: EpochSampler) -> None:
        self._loader, self.sampler = loader, sampler

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on."""
        self.sampler.at = (epoch, start)
        yield from self._loader


def train_loader(
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    group_by_aspect: bool = False,
    pin_memory: bool = False,
) -> TrainLoader:
    """`batch_size` is per rank. `group_by_aspect` keeps wide and tall pictures apart, which saves padding."""
    sizes = dataset.annotations.sizes
    sampler = EpochSampler(
        len(dataset),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        portrait=sizes[:, 0] > sizes[:, 1] if group_by_aspect else None,
    )
    samples = Samples(dataset.shared() if workers else dataset, transform, seed)
    return TrainLoader(_loader(samples, sampler, workers, pin_memory), sampler)


def eval_loader(
    dataset: Dataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Every image once, over all ranks: rank r takes images r, r + world_size, …, and none is repeated to even out."""
    mine = range(rank, len(dataset), world_size)
    batches = [
        [(0, i) for i in mine[start : start + batch_size]] for start in range(0, len(mine), batch_size)
    ]
    samples = Samples(dataset.shared() if workers else dataset, evaluation(preprocess), seed=0)
    return _loader(samples, batches, workers, pin_memory)


def _loader(samples: Samples, batches: Any, workers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        batch_size=None,  # the sampler gives whole batches, and `Samples` makes them
        sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if workers else None,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
