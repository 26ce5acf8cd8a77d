"""Running a model over a data set and scoring what it found.

Each image is seen once, whatever the number of ranks: every rank takes its share, rank 0 scores the whole and tells the
others, so that all of them return the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from detrcli import distributed
from detrcli.boxes import xyxy_to_xywh
from detrcli.data.annotations import Dataset
from detrcli.data.classes import labels_in
from detrcli.data.loader import eval_loader
from detrcli.errors import DataError, DetrError
from detrcli.evaluate.coco import Backend, CocoMetrics, choose_backend, score
from detrcli.evaluate.tables import DetectionTable, Ints, TruthTable
from detrcli.nn.inference import infer, refuse_non_finite
from detrcli.nn.speed import fastest
from detrcli.plugins.contract import Preprocess
from detrcli.types import Batch, Categories, Detections, Output

Postprocess = Callable[[Output, Tensor], list[Detections]]  # sizes (B, 2) height, width


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores, and the detections they were computed from."""

    coco: CocoMetrics
    detections: DetectionTable  # in the order of the data set
    split: str
    images: int
    batch_size: int
    seconds: float
    model: str = ""  # its name, where it was loaded by one
    weights: str = ""  # which, and why, in words

    @property
    def metrics(self) -> dict[str, float]:
        return self.coco.metrics

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    preprocess: Preprocess,
    postprocess: Postprocess,
    categories: Categories | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    workers: int = 0,
    amp: bool = False,
    limit: int | None = None,
    backend: Backend = "auto",
    advance: Callable[[int], None] | None = None,
) -> EvalResult:
    """Score `model` on `dataset`, or on its first `limit` images.

    `categories` are the model's, where they may differ from the data set's: classes are then matched by name, and what the
    data set does not know is left out. `advance` is told after each batch how many images were done.
    """
    backend = choose_backend(backend)  # every rank before it begins: only rank 0 scores
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    known = categories or dataset.categories
    category_ids = match_categories(known, dataset.categories)
    loader = eval_loader(
        dataset,
        preprocess,
        batch_size=batch_size,
        workers=workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    fast = fastest(model)  # a copy: the model may be in training
    started, found = time.perf_counter(), []
    for batch in loader:
        found.append(_detect(fast, batch, postprocess, category_ids, torch.device(device), amp))
        if advance is not None:
            advance(len(batch.image_ids))
    seconds = time.perf_counter() - started
    share = Share(DetectionTable.concatenate(found), seconds)
    return _score_together(dataset, share, batch_size, backend, lacking(known, dataset))


def match_categories(model: Categories, data: Categories) -> Ints:
    """For each label of the model the data set's category id, -1 where it has none: by id and name, else by name."""
    labels = labels_in(model, data)
    if (labels < 0).all():
        raise DataError(
            f"the model knows {_some(model.names)}, the data has {_some(data.names)}: no class in common",
            hint="evaluate on data with the classes that the model was trained on",
        )
    return np.array([*data.ids, -1], np.int64)[labels]


def lacking(model: Categories, dataset: Dataset) -> tuple[str, ...]:
    """A note where the data has objects of classes that the model does not know, which then count as never found."""
    data, notes = dataset.categories, dataset.annotations
    counts = np.bincount(notes.labels[~notes.crowd], minlength=len(data))
    unknown = np.flatnonzero((labels_in(data, model) < 0) & (counts > 0)).tolist()
    if not unknown:
        return ()
    names = _some([f"{data.names[label]} ({counts[label]})" for label in unknown])
    spare = [model.names[label] for label in np.flatnonzero(labels_in(model, data) < 0)]
    others = f"; it knows and the data has not: {_some(spare)}" if spare else ""
    return (
        f"{len(unknown)} of the data's {len(data)} classes, with {counts[unknown].sum()} objects, "
        f"are unknown to the model and score 0: {names}{others}",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ("" if len(names) <= 3 else f" … ({len(names)} classes)")


def _detect(
    model: nn.Module,
    batch: Batch,
    postprocess: Postprocess,
    category_ids: Ints,
    device: torch.device,
    amp: bool,
) -> DetectionTable:
    padded = bool(batch.mask.any())
    batch = batch.to(device)
    output = infer(model, batch.images, batch.mask if padded else None, amp=amp)
    answers = [a.cpu() for a in postprocess(output, batch.original_sizes)]
    tables = [_table(i, answer, category_ids) for i, answer in zip(batch.image_ids, answers, strict=True)]
    return DetectionTable.concatenate(tables)


def _table(image_id: int, answer: Detections, category_ids: Ints) -> DetectionTable:
    refuse_non_finite(answer, f"image {image_id}")
    scores = answer.scores.double().numpy()
    boxes = xyxy_to_xywh(answer.boxes.double()).numpy()
    labels = answer.labels.numpy()
    known = (labels < len(category_ids)) & (category_ids[np.minimum(labels, len(category_ids) - 1)] >= 0)
    image_ids = np.full(len(labels), image_id, np.int64)
    return DetectionTable(image_ids[known], category_ids[labels[known]], scores[known], boxes[known])


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank found, and how long it took."""

    detections: DetectionTable
    seconds: float


def _score_together(
    dataset: Dataset, mine: Share, batch_size: int, backend: Backend, notes: Sequence[str]
) -> EvalResult:
    """Gather on rank 0, score there, share the result; an error is shared too, for the others wait for an answer."""
    answer: list[EvalResult | DetrError | None] = [None]
    shares = _gather(mine)
    if shares:
        try:
            answer = [_score(dataset, shares, batch_size, backend, notes)]
        except DetrError as error:
            answer = [error]
    if distributed.running():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], EvalResult):
        return answer[0]
    raise answer[0] or DataError("rank 0 sent no result")


def _gather(mine: Share) -> list[Share]:
    """All shares on rank 0, none elsewhere."""
    if not distributed.running():
        return [mine]
    shares: list[Share | None] = [None] * distributed.world_size()
    dist.gather_object(mine, shares if distributed.is_main() else None)
    return [share for share in shares if share is not None]


def _score(
    dataset: Dataset, shares: list[Share], batch_size: int, backend: Backend, notes: Sequence[str]
) -> EvalResult:
    found = DetectionTable.concatenate([share.detections for share in shares])
    place = {int(image_id): i for i, image_id in enumerate(dataset.annotations.image_ids)}
    found = found.rows(np.argsort([place[i] for i in found.image_ids.tolist()], kind="stable"))
    coco = score(TruthTable.of(dataset), found, backend=backend, notes=notes)
    seconds = max(share.seconds for share in shares)
    return EvalResult(coco, found, dataset.split, len(dataset), batch_size, seconds)
