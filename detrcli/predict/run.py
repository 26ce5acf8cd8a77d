"""A model ready for pictures: `Predictor.predict` turns any number of them into results, in order, one at a time.

Reading and scaling run in threads a few pictures ahead of the model; nothing else is kept, so memory does not grow with the
number of pictures. Every picture is seen through one or more windows (see `tiles`); batches are made of windows.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from typing import TypedDict

import torch
from torch import Tensor, nn

from detrcli.data.images import Source
from detrcli.data.loader import collate
from detrcli.data.transforms import prepare
from detrcli.errors import ImageError, UsageError, unknown
from detrcli.nn.inference import infer, refuse_non_finite
from detrcli.plugins.contract import Preprocess
from detrcli.predict.result import Detection, Failure, Result
from detrcli.predict.sources import Input, expand
from detrcli.predict.tiles import Window, merge, windows
from detrcli.types import Categories, Detections, Output, Sample, Target

READERS = 2  # threads that decode; more would only compete with the model
BOUNDS = {  # of options: least, most
    "conf": (0, 1),
    "top": (1, math.inf),
    "batch": (1, math.inf),
    "max_size": (32, math.inf),
    "tile": (64, math.inf),
}
NOTHING = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that has been read, with the windows it is seen through."""

    name: str
    index: int
    pixels: Tensor  # (3, H, W) uint8
    notes: tuple[str, ...]
    windows: tuple[Window, ...]
    first: Sample  # through the first window, which is the whole picture

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]


@dataclass(frozen=True, slots=True)
class View:
    """A picture through one of its windows, ready for the model."""

    picture: Picture
    window: Window
    sample: Sample


class Options(TypedDict, total=False):
    """The options of `Predictor.predict`, for functions that hand them on."""

    conf: float
    top: int | None
    classes: str | int | Sequence[str | int]
    batch: int | None
    max_size: int | None
    tile: int | None
    amp: bool
    recursive: bool
    leave_out: Sequence[Path]
    on_failure: Callable[[Failure], None] | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How to look, and what to keep of the answers."""

    preprocess: Preprocess
    tile: int | None
    conf: float
    top: int | None
    labels: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    failure: Failure
    error: ImageError


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
        classes: str | int | Sequence[str | int] = (),
        batch: int | None = None,
        max_size: int | None = None,
        tile: int | None = None,
        amp: bool = False,
        recursive: bool = False,
        leave_out: Sequence[Path] = (),
        on_failure: Callable[[Failure], None] | None = None,
    ) -> Iterator[Result]:
        """The objects in each picture, in the order of the sources.

        `batch` is by default 1 or what the model insists on, `conf` is the lowest score, `top` the largest number a
        picture, `classes` names or ids to keep, `max_size` a limit for the long side that the model sees; with `tile`
        larger pictures are also seen in overlapping squares of that many pixels. `leave_out` are folders that are not
        entered from one above them. An unreadable picture raises an ImageError, or is given to `on_failure` and skipped;
        a wrong option is refused at once.
        """
        batch = self.only_batch or 1 if batch is None else batch
        _check(conf=conf, top=top, batch=batch, max_size=max_size, tile=tile)
        settings = Settings(self._sized(max_size), tile, conf, top, self._labels(classes))
        inputs = expand(sources, recursive=recursive, leave_out=leave_out)
        return self._results(_read_ahead(inputs, settings, 2 * batch), settings, batch, amp, on_failure)

    def _results(
        self,
        read: Iterator[Picture | Unreadable],
        settings: Settings,
        batch: int,
        amp: bool,
        on_failure: Callable[[Failure], None] | None,
    ) -> Iterator[Result]:
        views = _views(_readable(read, on_failure), settings)
        seen: list[tuple[Window, Detections]] = []
        notes: tuple[str, ...] = ()
        for group in _batched(views, batch):
            for view, answer in zip(group, self._answer(group, amp), strict=True):
                seen.append((view.window, _wanted(answer, settings)))
                notes = notes or _all_used(answer, settings)
                if len(seen) == len(view.picture.windows):
                    yield self._result(view.picture, seen, notes, settings.top)
                    seen, notes = [], ()

    def _labels(self, classes: str | int | Sequence[str | int]) -> frozenset[int] | None:
        chosen = [classes] if isinstance(classes, (str, int)) else list(classes)
        return frozenset(label for wanted in chosen for label in self._named(str(wanted))) if chosen else None

    def _named(self, wanted: str) -> list[int]:
        """The classes of that name, as it is written if there are some, else of that id."""
        names, ids = self.categories.names, map(str, self.categories.ids)
        exact = [label for label, name in enumerate(names) if name == wanted]
        alike = [label for label, name in enumerate(names) if name.casefold() == wanted.casefold()]
        found = exact or alike or [label for label, number in enumerate(ids) if number == wanted]
        if not found:
            raise unknown("class", wanted, names)
        return found

    def _sized(self, max_size: int | None) -> Preprocess:
        if max_size is None:
            return self.preprocess
        short, long = self.preprocess.short_side, self.preprocess.long_side
        return replace(self.preprocess, short_side=min(short, max_size), long_side=min(long, max_size))

    def _answer(self, views: Sequence[View], amp: bool) -> list[Detections]:
        """One answer a view, in pixels of its window."""
        batch = collate([view.sample for view in views])
        mask = batch.mask.to(self.device) if batch.mask.any() else None
        output = infer(self.model, batch.images.to(self.device), mask, amp=amp)
        answers = [a.cpu() for a in self.postprocess(output, batch.original_sizes.to(self.device))]
        for view, answer in zip(views, answers, strict=True):
            refuse_non_finite(answer, view.picture.name)
        return answers

    def _result(
        self,
        picture: Picture,
        seen: Sequence[tuple[Window, Detections]],
        notes: tuple[str, ...],
        top: int | None,
    ) -> Result:
        height, width = picture.size
        answer = merge([found for _, found in seen], [window for window, _ in seen], height, width)
        limit = torch.tensor([width, height, width, height], dtype=answer.boxes.dtype)
        boxes = torch.minimum(answer.boxes.clamp(min=0), limit)
        columns = (answer.scores[:top], answer.labels[:top], boxes[:top])
        found = [
            Detection(self.categories.ids[label], self.categories.names[label], score, tuple(box), label)
            for score, label, box in zip(*(column.tolist() for column in columns), strict=True)
        ]
        notes = picture.notes + notes
        return Result(picture.name, picture.index, width, height, tuple(found), picture.pixels, notes)


def _check(**options: float | None) -> None:
    for name, value in options.items():
        least, most = BOUNDS[name]
        if value is not None and not least <= value <= most:
            bound = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise UsageError(f"{name} must be {bound} (value given: {value})")


def _read_ahead(inputs: Iterator[Input], settings: Settings, ahead: int) -> Iterator[Picture | Unreadable]:
    """Pictures in order, each as soon as it is read, at most `ahead` of them waiting for the model."""
    queue: Queue[Future[Picture | Unreadable] | BaseException | None] = Queue(maxsize=ahead)
    pool = ThreadPoolExecutor(READERS, "detr-read")
    stop = threading.Event()

    def put(item: Future[Picture | Unreadable] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def feed() -> None:
        try:
            for index, item in enumerate(inputs):
                if stop.is_set():
                    return
                put(pool.submit(_picture, item, index, settings))
            put(None)
        except BaseException as error:  # whatever the caller's own iterator raises is the caller's
            put(error)

    threading.Thread(target=feed, name="detr-inputs", daemon=True).start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()
    finally:  # also when the caller stops early
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _picture(item: Input, index: int, settings: Settings) -> Picture | Unreadable:
    try:
        pixels, notes = item.read()
    except ImageError as error:
        return Unreadable(Failure(item.name, index, error.message), error)
    places = tuple(windows(pixels.shape[1], pixels.shape[2], settings.tile))
    return Picture(item.name, index, pixels, notes, places, _sample(pixels, places[0], settings))


def _sample(pixels: Tensor, window: Window, settings: Settings) -> Sample:
    part = pixels[:, window.y : window.y + window.height, window.x : window.x + window.width]
    return Sample(prepare(part, settings.preprocess), NOTHING, 0, (window.height, window.width))


def _readable(
    read: Iterable[Picture | Unreadable], on_failure: Callable[[Failure], None] | None
) -> Iterator[Picture]:
    for item in read:
        if isinstance(item, Picture):
            yield item
        elif on_failure is None:
            raise item.error
        else:
            on_failure(item.failure)


def _views(pictures: Iterator[Picture], settings: Settings) -> Iterator[View]:
    for picture in pictures:
        yield View(picture, picture.windows[0], picture.first)
        for window in picture.windows[1:]:
            yield View(picture, window, _sample(picture.pixels, window, settings))


def _batched(views: Iterator[View], size: int) -> Iterator[list[View]]:
    while group := list(islice(views, size)):
        yield group


def _wanted(answer: Detections, settings: Settings) -> Detections:
    keep = answer.scores >= settings.conf
    if settings.labels is not None:
        keep &= torch.isin(answer.labels, torch.tensor(sorted(settings.labels)))
    return Detections(answer.scores[keep], answer.labels[keep], answer.boxes[keep])


def _all_used(answer: Detections, settings: Settings) -> tuple[str, ...]:
    """A note where the model has no answer left over: it gives so many a view and no more, however many objects there are."""
    if not len(answer) or not settings.conf or float(answer.scores.min()) < settings.conf:
        return ()
    return (
        f"all {len(answer)} answers that the model has score {settings.conf:g} or more: "
        "there may be objects without one (--tile gives each part of the picture answers of its own)",
    )


def stem_of(name: str) -> str:
    """The part of a source's name that output files are called after."""
    base = os.path.splitext(os.path.basename(name.rstrip("/")))[0]
    safe = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in base)
    return safe.encode()[:150].decode(errors="ignore") or "picture"
