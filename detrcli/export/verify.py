"""An exported file against the model it came from, in the runtime that will run it: before anybody gets the file.

Batches of one, two and five pictures of several sizes, padded and not (see `pictures`), in the model and in the file. In float32 every
number must agree within `TOLERANCES`, and every detection of the model must be one of the file's. A half file has another
arithmetic: its detections must agree (`HALF`), and half of all answers closely.

Some models decide: a two-stage model which tokens become queries, Dynamic DETR in which level a box is looked at. Where two
choices are as good, rounding decides. Which query comes first does not matter: queries are a set, and are compared as one.
Where the choice changes the answer, the model itself answers quite differently when its pictures change in the sixth digit;
of several hundred queries two nearly always are as good. There the file must be as like the model as the model is like
itself: half of all numbers within `TOLERANCES`, and as many of the detections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detrcli.boxes import iou
from detrcli.export.graph import Postprocess
from detrcli.export.pictures import batches
from detrcli.export.plan import Request
from detrcli.nn.inference import infer
from detrcli.plugins.contract import Preprocess
from detrcli.types import Detections, Output

Measure = Callable[[Tensor, Tensor], float]

# A ten-thousandth of a picture is an eighth of a pixel at 1333; a thousandth of a logit moves no score by more than 0.00025.
TOLERANCES = {"logits": 1e-3, "boxes": 1e-4}
OTHERS = 1e-3  # scores, and what single papers answer besides
NUDGE = 1e-5  # relative change of a picture that may not change the answer by more than the tolerances
SLACK = 0.02  # of the detections, by which the file may be less like a model than the model is like itself


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


@dataclass(frozen=True, slots=True)
class Case:
    """One batch, in the model and in the file."""

    name: str
    pictures: str  # B x height x width
    differences: Mapping[
        str, float
    ]  # by answer, the largest; of half files, and where nothing is steady, the medians
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
    cases = tuple(check(pair, *batch) for batch in batches(pair.request, pair.preprocess, seed=0))
    tolerances = HALF_MEDIANS if pair.request.half else TOLERANCES
    reasons = tuple(reason for case in cases if (reason := why_not(case, pair.request.half)))
    return Report(cases, tolerances, passed=not reasons, reasons=reasons)


def check(pair: Pair, name: str, images: Tensor, mask: Tensor) -> Case:
    """One case; where it does not pass, the model is asked about nearly the same pictures."""
    sizes, half = torch.tensor([[1000, 1000]] * len(images)), pair.request.half
    like = HALF if half else EXACT
    expected, found = infer(pair.model, images, mask), infer(pair.exported, images, mask)
    ours, theirs = pair.after(expected, sizes), pair.exported_after(found, sizes)
    count, agreement = agreeing(ours, theirs, like)

    def compared(measure: Measure) -> dict[str, float]:
        if pair.request.postprocess:
            pairs = zip(ours, theirs, strict=True)
            return {"scores": max(measure(a.scores, b.scores) for a, b in pairs)}
        return differing(expected, found, half, measure)

    differences, steady = compared(median if half else largest), True
    passed = agreement >= like.share and within(differences, half)
    if not passed:
        again = infer(pair.model, nudged(images), mask)
        steady = within(differing(expected, again, half, median if half else largest), half)
        if not steady:
            _, own = agreeing(ours, pair.after(again, sizes), like)
            differences = compared(median)
            passed = agreement >= min(like.share, own - SLACK) and within(differences, half)
    shape = "x".join(map(str, (len(images), *images.shape[2:])))
    return Case(name, shape, differences, agreement, count, steady, passed)


def within(differences: Mapping[str, float], half: bool) -> bool:
    return all(value <= limit(answer, half) for answer, value in differences.items())


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
    doubt = "" if case.steady else "; the model is not steady there either"
    return f"{case.name} ({case.pictures}): {', '.join(over)}{doubt}"


def differing(a: Output, b: Output, half: bool, measure: Measure) -> dict[str, float]:
    """How far each answer that both give differs; queries in another order are the same."""
    found = _compared(a, b, measure)
    if within(found, half) or a.logits.shape != b.logits.shape:
        return found
    return _compared(a, in_order_of(a, b), measure)


def _compared(a: Output, b: Output, measure: Measure) -> dict[str, float]:
    pairs = {"logits": (a.logits, b.logits), "boxes": (a.boxes, b.boxes)}
    pairs |= {name: (a.extras[name], b.extras[name]) for name in a.extras if name in b.extras}
    return {name: measure(*two) for name, two in pairs.items()}


def largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max()) if a.numel() else 0.0


def median(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().median()) if a.numel() else 0.0


def in_order_of(a: Output, b: Output) -> Output:
    """The answers of b, each query in the place of that query of a which it is most like."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a.logits, b.logits, p=1) / a.logits.shape[2] + torch.cdist(a.boxes, b.boxes, p=1)
    places = [torch.as_tensor(linear_sum_assignment(one)[1]) for one in cost.nan_to_num(1e9).numpy()]
    order, picture = torch.stack(places), torch.arange(len(places))[:, None]
    extras = {n: v[picture, order] if v.shape[:2] == order.shape else v for n, v in b.extras.items()}
    return Output(b.logits[picture, order], b.boxes[picture, order], extras=extras)


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


def nudged(images: Tensor) -> Tensor:
    """Pictures that differ by little more than rounding."""
    generator = torch.Generator().manual_seed(0)
    return images * (1 + NUDGE * torch.randn(images.shape, generator=generator))
