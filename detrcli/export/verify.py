"""An exported file against the model it came from, in the runtime that will run it: before anybody gets the file.

Batches of one, two and five drawn pictures of several sizes, padded and not, in the model and in the file. In float32 every
number must agree within `TOLERANCES`, and every detection of the model must be one of the file's. A half file has another
arithmetic: its detections must agree (`HALF`), and half of all answers closely.

A two-stage model chooses its queries; where two of them are as good, rounding decides, and the model itself answers quite
differently when its pictures change in the seventh digit. Such pictures prove nothing and are replaced by others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detrcli.boxes import iou
from detrcli.data.loader import collate
from detrcli.data.shapes import PRESETS, SPLITS, Shapes
from detrcli.data.transforms import normalise, scale_pixels
from detrcli.export.graph import Postprocess
from detrcli.export.plan import Request
from detrcli.export.runtime import fitted
from detrcli.nn.inference import infer
from detrcli.plugins.contract import Preprocess
from detrcli.types import Detections, Output, Sample, Target

# A ten-thousandth of a picture is an eighth of a pixel at 1333; a thousandth of a logit moves no score by more than 0.00025.
TOLERANCES = {"logits": 1e-3, "boxes": 1e-4}
OTHERS = 1e-3  # scores, and what single papers answer besides
NUDGE = 1e-6  # relative change of a picture that may not change the answer by more than the tolerances
TRIES = 6  # pictures of which one should be steady


@dataclass(frozen=True, slots=True)
class Likeness:
    """When two detections are one: same class, and this much alike. `share` of the model's must be found."""

    overlap: float
    score: float
    least: float  # score from which on detections count
    share: float


EXACT = Likeness(overlap=0.99, score=1e-3, least=0.0, share=1.0)
HALF = Likeness(overlap=0.9, score=0.05, least=0.3, share=0.95)
HALF_MEDIANS = {"logits": 0.05, "boxes": 0.005}  # a half file's answers, after pairing the queries

# the sides of pictures as parts of the short side that the model is meant for, one pair a picture
SHAPES: Mapping[str, Sequence[tuple[float, float]]] = {
    "one picture": ((0.53, 0.67),),
    "two pictures, padded": ((0.4, 0.36), (0.31, 0.41)),
    "five pictures, padded": ((0.28, 0.36), (0.28, 0.3), (0.2, 0.36), (0.24, 0.24), (0.28, 0.36)),
}
LEAST = 48  # pixels a side


@dataclass(frozen=True, slots=True)
class Case:
    """One batch, in the model and in the file."""

    name: str
    pictures: str  # B x height x width
    differences: Mapping[str, float]  # the largest, by answer; of half files the medians
    agreement: float  # share of the model's detections that are the file's
    detections: int  # of the model, that count
    steady: bool  # whether the model itself answers the same when the pictures change a little
    passed: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and whether it will do."""

    cases: tuple[Case, ...]
    tolerances: Mapping[str, float]
    ap: Mapping[str, float] = field(default_factory=dict)  # of the model and of the file, on data
    passed: bool = True
    reasons: tuple[str, ...] = ()

    @property
    def largest(self) -> dict[str, float]:
        names = [name for case in self.cases for name in case.differences]
        return {
            n: max(c.differences[n] for c in self.cases if n in c.differences) for n in dict.fromkeys(names)
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"largest": self.largest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The model and the file, on the same pictures."""

    model: nn.Module
    exported: nn.Module
    after: Postprocess  # of the model's answers
    exported_after: Postprocess
    preprocess: Preprocess
    request: Request


@torch.no_grad()
def verify(pair: Pair) -> Report:
    """All cases that the file's axes allow."""
    cases = []
    for name, images, mask in batches(pair.request, pair.preprocess, seed=0):
        cases.append(check(pair, name, images, mask))
        for seed in range(1, TRIES):
            if cases[-1].steady or cases[-1].passed:
                break
            [(images, mask)] = [
                (i, m) for n, i, m in batches(pair.request, pair.preprocess, seed) if n == name
            ]
            cases[-1] = check(pair, name, images, mask)
    tolerances = HALF_MEDIANS if pair.request.half else TOLERANCES
    reasons = tuple(reason for case in cases if (reason := why_not(case, pair.request.half)))
    return Report(tuple(cases), tolerances, passed=not reasons, reasons=reasons)


def batches(request: Request, preprocess: Preprocess, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, images (B, 3, H, W) and mask (B, H, W) of each case."""
    for name, shares in SHAPES.items():
        if "batch" not in request.dynamic and len(shares) > 1:
            shares = shares[-1:]
            name = f"one of {name}"
        if request.size is not None and "size" not in request.dynamic:
            sizes = [within(request.size, share) for share in shares]
            yield name, *fitted(*drawn(sizes, preprocess, seed), request.size)
        else:
            sizes = [(_side(height, preprocess), _side(width, preprocess)) for height, width in shares]
            yield name, *drawn(sizes, preprocess, seed)


def _side(share: float, preprocess: Preprocess) -> int:
    return max(LEAST, round(share * preprocess.short_side))


def within(size: tuple[int, int], share: tuple[float, float]) -> tuple[int, int]:
    """A part of a fixed size; the rest of it is padding."""
    return max(1, round(size[0] * share[0] * 1.49)), max(1, round(size[1] * share[1] * 1.49))


def drawn(sizes: Sequence[tuple[int, int]], preprocess: Preprocess, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of circles, squares and triangles on soft backgrounds, prepared as for the model."""
    pictures = Shapes(PRESETS["hard"], SPLITS["test"], seed)
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    samples = [
        Sample(normalise(scale_pixels(pictures.read(i), (h, w)), preprocess), nothing, i, (h, w))
        for i, (h, w) in enumerate(sizes)
    ]
    batch = collate(samples)
    return batch.images.contiguous(), batch.mask


def check(pair: Pair, name: str, images: Tensor, mask: Tensor) -> Case:
    expected, found = infer(pair.model, images, mask), infer(pair.exported, images, mask)
    sizes = torch.tensor([[1000, 1000]] * len(images))
    ours, theirs = pair.after(expected, sizes), pair.exported_after(found, sizes)
    like = HALF if pair.request.half else EXACT
    count, agreement = agreeing(ours, theirs, like)
    if pair.request.postprocess:
        differences = {"scores": max(_largest(a.scores, b.scores) for a, b in zip(ours, theirs, strict=True))}
    else:
        differences = (medians if pair.request.half else largest)(expected, found)
    passed = agreement >= like.share and all(
        value <= limit(answer, pair.request.half) for answer, value in differences.items()
    )
    shape = "x".join(map(str, (len(images), *images.shape[2:])))
    return Case(
        name,
        shape,
        differences,
        agreement,
        count,
        passed or steady(pair.model, images, mask, expected),
        passed,
    )


def limit(answer: str, half: bool) -> float:
    if half:
        return HALF_MEDIANS.get(answer, HALF.score)
    return TOLERANCES.get(answer, OTHERS)


def why_not(case: Case, half: bool) -> str | None:
    """What is wrong with a case, in words."""
    if case.passed:
        return None
    over = [
        f"{name} differ by {value:.2g} (allowed: {limit(name, half):.0e})"
        for name, value in case.differences.items()
        if not value <= limit(name, half)
    ]
    over += [f"{case.agreement:.1%} of {case.detections} detections agree"] * (not over)
    doubt = "" if case.steady else "; no steady pictures were found"
    return f"{case.name} ({case.pictures}): {', '.join(over)}{doubt}"


def largest(a: Output, b: Output) -> dict[str, float]:
    """The largest difference of each answer that both give."""
    pairs = {"logits": (a.logits, b.logits), "boxes": (a.boxes, b.boxes)}
    pairs |= {name: (a.extras[name], b.extras[name]) for name in a.extras if name in b.extras}
    return {name: _largest(*two) for name, two in pairs.items()}


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max()) if a.numel() else 0.0


def medians(a: Output, b: Output) -> dict[str, float]:
    """The median differences of logits and boxes, each query beside the one most like it."""
    from scipy.optimize import linear_sum_assignment

    logits, boxes = [], []
    for la, lb, ba, bb in zip(a.logits, b.logits, a.boxes, b.boxes, strict=True):
        cost = torch.cdist(la, lb, p=1) / la.shape[1] + torch.cdist(ba, bb, p=1)
        rows, columns = map(torch.as_tensor, linear_sum_assignment(cost.nan_to_num(1e9).numpy()))
        logits.append((la[rows] - lb[columns]).abs().flatten())
        boxes.append((ba[rows] - bb[columns]).abs().flatten())
    return {"logits": float(torch.cat(logits).median()), "boxes": float(torch.cat(boxes).median())}


def agreeing(ours: Sequence[Detections], theirs: Sequence[Detections], like: Likeness) -> tuple[int, float]:
    """How many of the model's detections count, and the share of them that the file has too."""
    count = found = 0
    for a, b in zip(ours, theirs, strict=True):
        a = a.above(like.least)
        same = a.labels[:, None] == b.labels
        same &= (a.scores[:, None] - b.scores).abs() <= like.score
        close = (a.boxes[:, None] - b.boxes).abs().amax(-1) <= 1000 * TOLERANCES[
            "boxes"
        ]  # also of empty boxes
        same &= close | (iou(a.boxes[:, None], b.boxes[None])[0] >= like.overlap)
        count, found = count + len(a), found + int(same.any(1).sum())
    return count, found / count if count else 1.0


def steady(model: nn.Module, images: Tensor, mask: Tensor, answer: Output) -> bool:
    """Whether the model answers the same about pictures that differ by rounding."""
    generator = torch.Generator().manual_seed(0)
    nudged = images * (1 + NUDGE * torch.randn(images.shape, generator=generator))
    moved = largest(answer, infer(model, nudged, mask))
    return all(value <= limit(name, half=False) for name, value in moved.items())
