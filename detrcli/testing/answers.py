"""What becomes of a model's answer: pixels, saved results, exported files; on the small variants."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import SkipTest

import torch
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy
from detrcli.data.annotations import Dataset
from detrcli.data.catalog import resolve
from detrcli.errors import DetrError, UsageError
from detrcli.evaluate.coco import score
from detrcli.evaluate.run import evaluate
from detrcli.evaluate.tables import DetectionTable, TruthTable
from detrcli.export.plan import Request, check_software
from detrcli.export.run import export, untrained
from detrcli.plugins import Model
from detrcli.testing.samples import CLASSES, SMALL, objects, pictures, run_small
from detrcli.types import Output, Target


def detections_are_in_pixels(model: Model) -> None:
    for module in run_small(model):
        images, mask = pictures()
        with torch.no_grad():
            output = module(images, mask)
        small = model.postprocess(output, torch.tensor([[100, 200], [100, 200]]))
        large = model.postprocess(output, torch.tensor([[200, 400], [200, 400]]))
        for a, b in zip(small, large, strict=True):
            assert (a.scores[:-1] >= a.scores[1:]).all(), "detections come best first"
            assert ((a.labels >= 0) & (a.labels < CLASSES)).all(), (
                "labels are contiguous, without the no-object channel"
            )
            assert torch.allclose(a.boxes * 2, b.boxes, atol=1e-3), (
                "boxes are xyxy in pixels of the sizes given"
            )


def perfect_answers_return_the_truth(model: Model) -> None:
    """Post-processing undoes what the transforms did: a perfect answer gives the objects back, in pixels."""
    for module in run_small(model):
        images, mask = pictures()
        with torch.no_grad():
            output = module(images, mask)
        truth = objects(min(3, output.logits.shape[1]))
        found = model.postprocess(_sure_of(output, truth), torch.tensor([[100, 200], [100, 200]]))
        wanted = cxcywh_to_xyxy(truth.boxes) * torch.tensor([200, 100, 200, 100])
        for one in found:
            for label, box in zip(truth.labels, wanted, strict=True):
                near = (one.boxes - box).abs().amax(1) < 1e-2
                assert (near & (one.labels == label)).any(), (
                    "a query that is sure of a class and box comes back with this label and box in pixels"
                )


def perfect_answers_score_one(model: Model) -> None:
    """From the answer through post-processing and a COCO results file to the numbers of pycocotools."""
    for module in run_small(model):
        data = resolve("shapes", "val").select(range(3))
        found = evaluate(
            _Perfect(module, [_truth(data, index) for index in range(len(data))]),
            data,
            preprocess=model.variant.preprocess,
            postprocess=model.postprocess,
        ).detections
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "detections.json"
            found.write(saved)
            ap = score(TruthTable.of(data), DetectionTable.read(saved), backend="pycocotools").metrics["ap"]
        assert ap > 0.999, (
            f"queries that are sure of every object of three pictures score AP {ap:.3f}, not 1: scores of "
            "post-processing must follow the logits, and boxes be xyxy in pixels of the sizes given"
        )


class _Perfect(nn.Module):
    """The model, with its first queries sure of the objects of each picture in turn."""

    def __init__(self, module: nn.Module, truth: Sequence[Target]) -> None:
        super().__init__()
        self.module, self.truth, self.seen = module, truth, 0

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        self.seen += 1
        return _sure_of(self.module(images, mask), self.truth[self.seen - 1])


def _sure_of(output: Output, truth: Target) -> Output:
    """The same answer, but the first queries have the classes and boxes of the truth, and the others nothing."""
    logits, boxes = torch.full_like(output.logits, -20.0), output.boxes.clone()
    if output.logits.shape[2] > CLASSES:
        logits[..., -1] = 20.0
    for query, label in enumerate(truth.labels.tolist()):
        logits[:, query], logits[:, query, label] = -20.0, 20.0
        boxes[:, query] = truth.boxes[query]
    return replace(output, logits=logits, boxes=boxes)


def _truth(data: Dataset, index: int) -> Target:
    found, (height, width) = data.annotations.objects(index), data.annotations.sizes[index].tolist()
    x, y, w, h = torch.tensor(found.boxes, dtype=torch.float32).unbind(1)
    boxes = torch.stack((x + w / 2, y + h / 2, w, h), 1) / torch.tensor([width, height, width, height])
    return Target(torch.tensor(found.labels), boxes)


def exported_files_answer_the_same(model: Model) -> None:
    """`detr export` proves every file against its model; here one of the small variant, for any batch and size."""
    if model.family.cannot_export:
        raise SkipTest(f"{model.family.name} cannot be exported: {model.family.cannot_export}")
    if model.variant.params > SMALL:
        return
    try:
        check_software("onnx")
    except UsageError as missing:
        raise SkipTest(f"{missing.message}; {missing.hint}") from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(untrained(model), Path(folder) / "model.onnx", Request(format="onnx"))
        except DetrError as error:
            raise AssertionError(
                f"detr export --model {model.name} --weights random: {error.message} ({error.hint}); "
                "take sizes from x.shape, for len(x) fixes an axis; "
                f"if no graph can hold what {model.family.name} does, say why: cannot_export=WHY"
            ) from error
