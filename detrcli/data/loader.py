"""From a `Dataset` to batches, in an order that is a function of (seed, epoch) alone.

Nothing here holds a state that a checkpoint would have to save: batch k of epoch e is always the same, whatever the
number of workers, and with N ranks the global batch is cut into N parts. Resuming is `batches.epoch(e, start=k)`.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from detrcli.data.annotations import Dataset
from detrcli.data.masks import masks_of
from detrcli.data.memory import recycled
from detrcli.data.sampler import AUGMENT, EpochSampler, Key, Shard
from detrcli.data.transforms import Size, Transform, View, evaluation, normalise, target_of, view_of
from detrcli.errors import DetrError, ImageError
from detrcli.plugins.contract import Preprocess
from detrcli.processors import processors
from detrcli.types import Batch, Sample, Target


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad the pictures at the bottom and on the right to the largest height and width."""
    images, mask = _canvas([(s.image.shape[1], s.image.shape[2]) for s in samples], shared=False)
    for image, sample in zip(images, samples, strict=True):
        _, height, width = sample.image.shape
        image[:, :height, :width] = sample.image
        image[:, height:] = 0
        image[:, :height, width:] = 0
    return Batch(
        images,
        mask,
        tuple(_pad_masks(s.target, images) for s in samples),
        tuple(s.image_id for s in samples),
        torch.tensor([s.original_size for s in samples]),
    )


def _canvas(sizes: Sequence[Size], *, shared: bool) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), channels last, unset, and the mask of what will be padding in them (B, H, W)."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    shape = (len(sizes), height, width, 3)
    images = (_shared(shape) if shared else recycled(shape)).permute(0, 3, 1, 2)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for padding, (h, w) in zip(mask, sizes, strict=True):
        padding[h:] = True
        padding[:h, w:] = True
    return images, mask


def _shared(shape: tuple[int, ...]) -> Tensor:
    """A float tensor in shared memory from the start, so that a worker hands it over without a copy."""
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0).set_(storage).view(shape)


def _share(tensors: Iterable[Tensor]) -> None:
    """Into shared memory here: where it is full while torch sends a batch off, the batch is lost without an answer."""
    for tensor in tensors:
        if tensor.untyped_storage().nbytes():
            tensor.share_memory_()  # type: ignore[no-untyped-call]


@contextmanager
def _shared_memory() -> Iterator[None]:
    """Inside, shared memory is taken; a container has little of it unless told."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _is_full(error):
            raise
        raise DetrError(
            "/dev/shm is full, through which workers hand pictures over",
            hint="give the container more (docker run --shm-size 8g), or read in this process: --workers 0",
        ) from error


def _is_full(error: RuntimeError | OSError) -> bool:
    """torch says so of memory and, of a worker that the system has ended for it, that it is possible; of a lock the system."""
    return "shared memory" in str(error) or getattr(error, "errno", None) == errno.ENOSPC


def _pad_masks(target: Target, images: Tensor) -> Target:
    if "masks" not in target.extras:
        return target
    masks = target.extras["masks"]
    padded = masks.new_zeros(len(masks), *images.shape[-2:])
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return dataclasses.replace(target, extras={**target.extras, "masks": padded})


@dataclass(frozen=True, slots=True)
class Made:
    """What comes back from a worker: a batch, the pictures that were replaced in it, or why there is none."""

    batch: Batch | None
    skipped: dict[str, str]  # file name -> reason
    error: DetrError | None = None


@dataclass(frozen=True, slots=True)
class Samples(TorchDataset[Made]):
    """What a worker process holds: a list of keys becomes a batch. Pictures stay uint8 until they are normalised
    straight into their place in the batch."""

    dataset: Dataset
    transform: Transform
    seed: int
    skip_bad: bool = False
    reading: Tensor | None = None  # (workers,) in shared memory: the image that each worker has in hand

    def __getitem__(self, keys: list[Key]) -> Made:
        skipped: dict[str, str] = {}
        try:
            taken = [self._readable(key, skipped) for key in keys]
            with _shared_memory():
                return Made(self._batch(taken), skipped)
        except DetrError as error:  # as a value: torch would wrap it in the text of a worker's traceback
            return Made(None, skipped, error)

    def _readable(self, key: Key, skipped: dict[str, str]) -> tuple[int, View, Size]:
        """The sample of a key, or of the next image that can be read where bad ones are to be skipped."""
        epoch, first = key
        for index in (*range(first, len(self.dataset)), *range(first)):
            try:
                return index, *self.view(epoch, index)
            except ImageError as error:
                if not self.skip_bad:
                    raise
                skipped[self.dataset.annotations.names[index]] = error.message
        raise ImageError(f"{self.dataset.name}: no picture can be read", hint=self.dataset.check_command)

    def _batch(self, taken: list[tuple[int, View, Size]]) -> Batch:
        views = [view for _, view, _ in taken]
        shared = get_worker_info() is not None
        images, mask = _canvas([v.size for v in views], shared=shared)
        for image, view in zip(images, views, strict=True):
            normalise(view.pixels, self.transform.preprocess, image)
        targets = tuple(_pad_masks(target_of(view), images) for view in views)
        image_ids = tuple(int(self.dataset.annotations.image_ids[index]) for index, _, _ in taken)
        batch = Batch(images, mask, targets, image_ids, torch.tensor([original for _, _, original in taken]))
        if shared:
            parts = (part for t in targets for part in (t.labels, t.boxes, *t.extras.values()))
            _share([mask, batch.original_sizes, *parts])
        return batch

    def view(self, epoch: int, index: int) -> tuple[View, Size]:
        """The transformed picture, uint8, and its original size."""
        annotations, worker = self.dataset.annotations, get_worker_info()
        if worker is not None and self.reading is not None:
            self.reading[worker.id] = index
        pixels, objects = self.dataset.picture(index), annotations.objects(index)
        original = (pixels.shape[1], pixels.shape[2])
        view = view_of(pixels, objects, masks_of(annotations, objects, original))
        return self.transform(view, np.random.default_rng([self.seed, AUGMENT, epoch, index])), original


def readers(device: str) -> int:
    """Processes that read pictures for a device, unless the user says: a GPU's share of the processors, at most eight; none for
    a CPU, whose processors the model needs."""
    if not device.startswith("cuda"):
        return 0
    return min(8, processors() // max(1, torch.cuda.device_count()))


class Batches:
    """Batches of any epoch from any step. Worker processes stay alive between epochs; should one die (out of memory,
    killed), the loader starts anew once from the batch that is missing, and says so the second time."""

    def __init__(
        self, samples: Samples, sampler: EpochSampler | Shard, *, workers: int, pin_memory: bool
    ) -> None:
        self._reading = torch.zeros(workers, dtype=torch.int64)
        dataset = samples.dataset
        if workers:
            with _shared_memory():
                _share([self._reading])
                dataset = dataset.shared()
        self.samples = dataclasses.replace(samples, dataset=dataset, reading=self._reading)
        self.sampler = sampler
        self.skipped: dict[str, str] = {}  # bad pictures met so far, with their reasons
        self._workers, self._pin_memory = workers, pin_memory
        self._todo: list[
            list[Key]
        ] = []  # one list object for good: the loader of torch reads it anew every time
        self._loader = self._start()

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on."""
        todo, done, deaths = self.sampler.keys(epoch, start), 0, 0
        while done < len(todo):
            self._todo[:] = todo[done:]
            try:
                with _shared_memory():
                    for made in self._iterate():
                        done += 1
                        yield self._open(made)
            except (RuntimeError, EOFError, OSError) as error:
                if not _is_death(error):
                    raise
                deaths += 1
                if deaths > 1:
                    raise self._died() from error
                self._loader = self._start()

    def steps(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        """The steps of an epoch, each as the batches that it accumulates."""
        batches = self.epoch(epoch, start=start)
        while parts := list(itertools.islice(batches, self.sampler.batches_a_step)):
            yield parts

    def _start(self) -> DataLoader[Made]:
        return DataLoader(
            self.samples,
            batch_size=None,  # the sampler gives whole batches, and `Samples` makes them
            sampler=self._todo,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._pin_memory,
            worker_init_fn=_one_thread if self._workers else None,
        )

    def _iterate(self) -> Iterator[Made]:
        """An iterator that reports the death of a worker here, not from a signal handler amid the training step."""
        if self._workers == 0 or threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        before = signal.getsignal(signal.SIGCHLD)
        iterator = iter(self._loader)
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return iterator

    def _open(self, made: Made) -> Batch:
        self.skipped |= made.skipped
        if made.batch is None:
            assert made.error is not None
            raise made.error
        return made.batch

    def _died(self) -> DetrError:
        dataset = self.samples.dataset
        names = [dataset.annotations.names[index] for index in self._reading.tolist()]
        return DetrError(
            f"a data worker died twice (killed, or out of memory) while reading {' or '.join(names)}",
            hint=f"read with fewer workers (--workers 0: in this process), or look: {dataset.check_command}",
        )


def _is_death(error: Exception) -> bool:
    """torch says so, or the socket that a batch should have come through has gone with the worker."""
    return isinstance(error, (EOFError, OSError)) or "DataLoader worker (pid" in str(error)


def train_loader(
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    parts: int = 1,
    group_by_aspect: bool = False,
    skip_bad: bool = False,
    pin_memory: bool = False,
) -> Batches:
    """`batch_size` is that of one of the `parts` of a step on one rank. `group_by_aspect` keeps wide and tall pictures apart, which saves padding; `skip_bad`
    takes the next picture for one that cannot be read, and remembers it in `skipped`."""
    sizes = dataset.annotations.sizes
    portrait = sizes[:, 0] > sizes[:, 1] if group_by_aspect else None
    sampler = EpochSampler(len(dataset), batch_size, seed, rank, world_size, portrait, parts)
    samples = Samples(dataset, transform, seed, skip_bad)
    return Batches(samples, sampler, workers=workers, pin_memory=pin_memory)


def eval_loader(
    dataset: Dataset,
    preprocess: Preprocess,
    *,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Batches:
    """Every image once, over all ranks. A picture that cannot be read is an error: skipping it would change the AP."""
    samples = Samples(dataset, evaluation(preprocess), seed=0)
    sampler = Shard(len(dataset), batch_size, rank, world_size)
    return Batches(samples, sampler, workers=workers, pin_memory=pin_memory)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
