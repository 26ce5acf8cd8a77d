"""A model ready for pictures: `Predictor.predict` turns any number of them into results, in order, one at a time.

Reading and scaling run in threads a few pictures ahead of the model; nothing else is kept, so memory does not grow with the
number of pictures.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from detrcli.data.images import read_image
from detrcli.data.loader import collate
from detrcli.data.transforms import prepare
from detrcli.errors import ImageError, unknown
from detrcli.nn.inference import infer
from detrcli.plugins.contract import Preprocess
from detrcli.predict.result import Detection, Failure, Result
from detrcli.predict.sources import Input, Source, expand
from detrcli.types import Categories, Detections, Output, Sample, Target

READERS = 2  # threads that decode; more would only compete with the model
NOTHING = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that has been read."""

    name: str
    index: int
    pixels: Tensor  # (3, H, W) uint8
    sample: Sample
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What to keep of a model's answers."""

    conf: float
    top: int | None
    labels: frozenset[int] | None


@dataclass(frozen=True)
class Predictor:
    """A trained model with all that it takes to use it."""

    name: str  # family/variant
    weights: str  # which weights and why, in words
    model: nn.Module
    categories: Categories
    preprocess: Preprocess
    postprocess: Callable[[Output, Tensor], list[Detections]]
    device: torch.device
    only_batch: int | None = None  # a batch size that the model insists on

    def predict(
        self,
        sources: Source | Iterable[Source],
        *,
        conf: float = 0.3,
        top: int | None = None,
        classes: Sequence[str] = (),
        batch: int = 1,
        max_size: int | None = None,
        amp: bool = False,
        recursive: bool = False,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> Iterator[Result]:
        """The objects in each picture, in the order of the sources.

        `conf` is the lowest score, `top` the largest number a picture, `classes` names or ids to keep, `max_size` a limit for
        the long side that the model sees. An unreadable picture raises an ImageError, or is given to `on_failure` and skipped.
        """
        settings = Settings(conf, top, self._labels(classes))
        pictures = self._read(expand(sources, recursive=recursive), self._sized(max_size), 2 * batch)
        readable = _pass_failures(pictures, on_failure)
        for group in _batched(readable, self.only_batch or batch):
            yield from self._answer(group, settings, amp)

    def _labels(self, classes: Sequence[str]) -> frozenset[int] | None:
        if not classes:
            return None
        by_name = {name.casefold(): label for label, name in enumerate(self.categories.names)}
        by_id = {str(number): label for label, number in enumerate(self.categories.ids)}
        labels = set()
        for wanted in classes:
            label = by_name.get(wanted.casefold(), by_id.get(wanted))
            if label is None:
                raise unknown("class", wanted, self.categories.names)
            labels.add(label)
        return frozenset(labels)

    def _sized(self, max_size: int | None) -> Preprocess:
        if max_size is None:
            return self.preprocess
        short, long = self.preprocess.short_side, self.preprocess.long_side
        return replace(self.preprocess, short_side=min(short, max_size), long_side=min(long, max_size))

    def _read(
        self, inputs: Iterator[Input], preprocess: Preprocess, ahead: int
    ) -> Iterator[Picture | tuple[Failure, ImageError]]:
        """Pictures in order, up to `ahead` of them read in advance."""
        waiting: deque[Future[Picture | tuple[Failure, ImageError]]] = deque()
        with ThreadPoolExecutor(READERS, "detr-read") as pool:
            try:
                for index, item in enumerate(inputs):
                    waiting.append(pool.submit(_picture, item, index, preprocess))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # the caller may stop early
                for future in waiting:
                    future.cancel()

    def _answer(self, pictures: Sequence[Picture], settings: Settings, amp: bool) -> Iterator[Result]:
        batch = collate([picture.sample for picture in pictures])
        mask = batch.mask.to(self.device) if batch.mask.any() else None
        output = infer(self.model, batch.images.to(self.device), mask, amp=amp)
        answers = self.postprocess(output, batch.original_sizes.to(self.device))
        for picture, answer in zip(pictures, answers, strict=True):
            yield self._result(picture, _chosen(answer.cpu(), settings))

    def _result(self, picture: Picture, answer: Detections) -> Result:
        height, width = picture.sample.original_size
        limit = torch.tensor([width, height, width, height], dtype=answer.boxes.dtype)
        boxes = torch.minimum(answer.boxes.clamp(min=0), limit)
        found = (
            Detection(self.categories.ids[label], self.categories.names[label], score, tuple(box), label)
            for score, label, box in zip(
                answer.scores.tolist(), answer.labels.tolist(), boxes.tolist(), strict=True
            )
        )
        return Result(picture.name, picture.index, width, height, tuple(found), picture.pixels, picture.notes)


def _picture(item: Input, index: int, preprocess: Preprocess) -> Picture | tuple[Failure, ImageError]:
    try:
        if isinstance(item.source, ImageError):
            raise item.source
        pixels = read_image(item.source, name=item.name)
    except ImageError as error:
        return Failure(item.name, index, error.message), error
    size = (pixels.shape[1], pixels.shape[2])
    return Picture(item.name, index, pixels, Sample(prepare(pixels, preprocess), NOTHING, index, size))


def _pass_failures(
    pictures: Iterable[Picture | tuple[Failure, ImageError]], on_failure: Callable[[Failure], None] | None
) -> Iterator[Picture]:
    for picture in pictures:
        if isinstance(picture, Picture):
            yield picture
        elif on_failure is None:
            raise picture[1]
        else:
            on_failure(picture[0])


def _batched(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    while group := list(islice(pictures, size)):
        yield group


def _chosen(answer: Detections, settings: Settings) -> Detections:
    keep = answer.scores >= settings.conf
    if settings.labels is not None:
        keep &= torch.isin(answer.labels, torch.tensor(sorted(settings.labels)))
    rows = keep.nonzero()[:, 0][: settings.top]
    return Detections(answer.scores[rows], answer.labels[rows], answer.boxes[rows])


def stem_of(name: str) -> str:
    """The part of a source's name that output files are called after."""
    base = os.path.splitext(os.path.basename(name.rstrip("/")))[0]
    safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in base)
    return safe.encode()[:150].decode(errors="ignore") or "picture"
