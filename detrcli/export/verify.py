"""An exported file against the model it came from, in the runtime that will run it: before anybody gets the file.

Batches of one, two and five pictures of several sizes, padded and not (see `pictures`), in the model and in the file. In float32 every
number must agree within `TOLERANCES`, and the detections of each must be the other's. A half file has another arithmetic: its
detections must agree as well as 16 bits allow (`HALF`), sure ones and the best of each picture, and half of all numbers closely. A file
with post-processing is asked for scores, labels and boxes instead of the model's own answers.

Some models decide: a two-stage model which tokens become queries, Dynamic DETR in which level a box is looked at. Where two
choices are as good, rounding decides. Which query comes first does not matter: queries are a set, and are compared as one.
Where the choice changes the answer, the model itself answers quite differently when its pictures change by as much as rounding
does (`NUDGE`); of several hundred queries two nearly always are as good. There the file must be as like the model as the model is
like itself: half of all numbers within `TOLERANCES`, and as many of the sure detections. Best ones that a model does not find again
itself tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detrcli.boxes import iou
from detrcli.errors import DetrError, VerificationError
from detrcli.export.graph import Postprocess
from detrcli.export.pictures import batches
from detrcli.export.plan import Request
from detrcli.nn.inference import infer
from detrcli.plugins.contract import Preprocess
from detrcli.types import Detections, Output

Rule = Literal["largest", "median"]  # of all differences, which one is judged

# A ten-thousandth of a picture is an eighth of a pixel at 1333; a thousandth of a logit moves no score by more than 0.00025.
TOLERANCES = {"logits": 1e-3, "boxes": 1e-4}
OTHERS = 1e-3  # scores, and what single papers answer besides
# Relative change of a picture that moves answers as arithmetic in 32 and in 16 bits does: half of dino/r50's logits, of random
# weights, by 0.018, and those of its half file by 0.019.
NUDGE = {False: 1e-5, True: 4e-3}
SLACK = 0.02  # of the detections, by which the file may be less like a model than the model is like itself
SIDE = 1000  # pixels, of the pictures in which detections are compared


@dataclass(frozen=True, slots=True)
class Likeness:
    """When two detections are one: same class, and this much alike. So large a share of each side's must be the other's."""

    overlap: float
    score: float
    least: float  # score from which on a detection is sure
    best: int  # detections of a picture that count besides, whatever their score
    share: float  # of the sure ones
    share_of_best: float


EXACT = Likeness(overlap=0.99, score=1e-3, least=0.0, best=0, share=1.0, share_of_best=1.0)
# which of two tokens that are as good becomes a query is another one in 16 bits: for random weights that is one of ten
HALF = Likeness(overlap=0.9, score=0.05, least=0.3, best=10, share=0.95, share_of_best=0.7)
HALF_MEDIANS = {"logits": 0.05, "boxes": 0.005}  # a half file's answers, after pairing the queries


@dataclass(frozen=True, slots=True)
class Differences:
    """How far each answer of the file is from the model's, by the answer's name."""

    largest: Mapping[str, float]
    median: Mapping[str, float]

    def by(self, rule: Rule) -> Mapping[str, float]:
        return self.largest if rule == "largest" else self.median


@dataclass(frozen=True, slots=True)
class Case:
    """One batch, in the model and in the file."""

    name: str
    pictures: str  # B x height x width
    largest: Mapping[str, float]  # difference of each answer
    median: Mapping[str, float]
    rule: Rule  # which of the two was judged: the median of half files, and where nothing is steady
    agreement: (
        float  # share of the model's sure detections that are the file's, or the other way round: the smaller
    )
    agreement_of_best: float  # the same of the best ones of a half file, sure or not
    detections: int  # of the model, that are sure
    steady: bool  # whether the model itself answers the same when the pictures change a little
    passed: bool

    @property
    def judged(self) -> Mapping[str, float]:
        return self.largest if self.rule == "largest" else self.median


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
        return worst(case.largest for case in self.cases)

    @property
    def median(self) -> dict[str, float]:
        return worst(case.median for case in self.cases)

    def judged(self, rule: Rule) -> dict[str, float]:
        """The worst of what was judged, over the cases that were judged by this rule."""
        return worst(case.judged for case in self.cases if case.rule == rule)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"largest": self.largest, "median": self.median}


def worst(cases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest number of each name; NaN is worse than any."""
    found: dict[str, float] = {}
    for case in cases:
        for name, value in case.items():
            found[name] = max(found.get(name, 0.0), value, key=lambda v: math.inf if math.isnan(v) else v)
    return found


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
    reasons = tuple(reason for case in cases if (reason := why_not(case, pair.request.half)))
    return Report(cases, tolerances(pair.request.half), passed=not reasons, reasons=reasons)


def check(pair: Pair, name: str, images: Tensor, mask: Tensor) -> Case:
    """One case; where it does not pass, the model is asked about nearly the same pictures."""
    half = pair.request.half
    like, rule, steady = HALF if half else EXACT, usual(half), True
    ours, theirs = of_model(pair, images, mask), of_file(pair, images, mask)
    found, agreed = differing(ours, theirs, half), agreeing(ours.detections, theirs.detections, like)
    enough = Agreement(0, like.share, like.share_of_best)
    if not (within(found.by(rule), half) and agreed.reaches(enough)):
        again = of_model(pair, nudged(images, half), mask)
        own = agreeing(ours.detections, again.detections, like)
        sure = within(differing(ours, again, half).by(rule), half)
        steady = sure and own.reaches(enough)
        rule = rule if sure else "median"
        enough = enough if steady else enough.or_less(own)
    passed = within(found.by(rule), half) and agreed.reaches(enough)
    shape = "x".join(map(str, (len(images), *images.shape[2:])))
    return Case(
        name, shape, found.largest, found.median, rule, agreed.sure, agreed.best, agreed.count, steady, passed
    )


def usual(half: bool) -> Rule:
    return "median" if half else "largest"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of detections that two sides have in common."""

    count: int  # sure ones of the first side
    sure: float
    best: float

    def reaches(self, other: Agreement) -> bool:
        return self.sure >= other.sure and self.best >= other.best

    def or_less(self, own: Agreement) -> Agreement:
        """Enough for a model that is no more like itself; best ones that it does not find again itself tell nothing."""
        return Agreement(0, min(self.sure, own.sure - SLACK), self.best if own.best >= self.best else 0.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one side to one batch: what is compared number by number, and as detections."""

    numbers: Output | None  # of a file with post-processing there are only detections
    detections: list[Detections]


def of_model(pair: Pair, images: Tensor, mask: Tensor) -> Answer:
    output = infer(pair.model, images, mask)
    return Answer(None if pair.request.postprocess else output, pair.after(output, squares(images)))


def of_file(pair: Pair, images: Tensor, mask: Tensor) -> Answer:
    """An error of verification where the file does not answer, or not with what it should."""
    try:
        output = infer(pair.exported, images, mask)
        detections = pair.exported_after(output, squares(images))
    except Exception as error:  # each runtime has its own, and a file may lack any answer
        said = error.message if isinstance(error, DetrError) else f"{type(error).__name__}: {error}"
        raise VerificationError(said) from error
    return Answer(None if pair.request.postprocess else output, detections)


def squares(images: Tensor) -> Tensor:
    return torch.full((len(images), 2), SIDE)


def within(differences: Mapping[str, float], half: bool) -> bool:
    return all(value <= limit(answer, half) for answer, value in differences.items())


def limit(answer: str, half: bool) -> float:
    return tolerances(half).get(answer, HALF.score if half else OTHERS)


def tolerances(half: bool) -> Mapping[str, float]:
    return HALF_MEDIANS if half else TOLERANCES


def why_not(case: Case, half: bool) -> str | None:
    """What is wrong with a case, in words."""
    if case.passed:
        return None
    over = [
        f"{name} differ by {value:.2g} (allowed: {limit(name, half):.0e})"
        for name, value in case.judged.items()
        if not value <= limit(name, half)
    ]
    if not over:
        share, what = min((case.agreement, "detections"), (case.agreement_of_best, "best detections"))
        over = [f"{share:.1%} of the {what} agree"]
    doubt = "" if case.steady else "; the model is not steady there either"
    return f"{case.name} ({case.pictures}): {', '.join(over)}{doubt}"


def differing(a: Answer, b: Answer, half: bool) -> Differences:
    """How far each answer that both give differs; queries, or detections, in another order are the same."""
    found = measured(numbers(a), numbers(b))
    if within(found.by(usual(half)), half) or math.inf in found.largest.values():
        return found
    return measured(numbers(a), numbers(in_order_of(a, b)))


def numbers(answer: Answer) -> dict[str, Tensor]:
    """What is compared, by name."""
    if answer.numbers is not None:
        return {"logits": answer.numbers.logits, "boxes": answer.numbers.boxes} | answer.numbers.extras
    found = answer.detections
    return {
        "scores": torch.cat([one.scores for one in found]),
        "boxes": torch.cat([one.boxes for one in found]) / SIDE,
        "labels": torch.cat([one.labels for one in found]),
    }


def measured(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Differences:
    apart = {name: gaps(name, a[name], b[name]) for name in a if name in b}
    return Differences(
        {name: float(gap.max()) if gap.numel() else 0.0 for name, gap in apart.items()},
        {name: float(gap.median()) if gap.numel() else 0.0 for name, gap in apart.items()},
    )


def gaps(name: str, a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        return torch.tensor([math.inf])
    return (a != b).float() if name == "labels" else (a - b).abs()


def in_order_of(a: Answer, b: Answer) -> Answer:
    """The answer b, each query or detection in the place of that of a which it is most like."""
    if a.numbers is not None and b.numbers is not None:
        return Answer(_queries_of(a.numbers, b.numbers), b.detections)
    rows = zip(a.detections, b.detections, strict=True)
    return Answer(None, [_detections_of(*pair) for pair in rows])


def _queries_of(a: Output, b: Output) -> Output:
    cost = torch.cdist(a.logits, b.logits, p=1) / a.logits.shape[2] + torch.cdist(a.boxes, b.boxes, p=1)
    order, picture = torch.stack([places(one) for one in cost]), torch.arange(len(cost))[:, None]
    extras = {n: v[picture, order] if v.shape[:2] == order.shape else v for n, v in b.extras.items()}
    return Output(b.logits[picture, order], b.boxes[picture, order], extras=extras)


def _detections_of(a: Detections, b: Detections) -> Detections:
    cost = (a.labels[:, None] != b.labels).float() + (a.scores[:, None] - b.scores).abs()
    order = places(cost + torch.cdist(a.boxes, b.boxes, p=1) / SIDE)
    return Detections(b.scores[order], b.labels[order], b.boxes[order])


def places(cost: Tensor) -> Tensor:
    """Of the rows and columns of a matrix, which columns belong to the rows so that all together cost least."""
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(cost.nan_to_num(1e9).numpy())[1])


def agreeing(ours: Sequence[Detections], theirs: Sequence[Detections], like: Likeness) -> Agreement:
    """The share of each side's detections that the other has too: the smaller one of the two.

    Where little is sure, as with random weights, the best say whether the answers are the same at all.
    """
    same = [alike(a, b, like) for a, b in zip(ours, theirs, strict=True)]
    there, back = [one.any(1) for one in same], [one.any(0) for one in same]
    sure, best = (
        min(share(ours, there, counts), share(theirs, back, counts))
        for counts in (lambda one: one.scores >= like.least, lambda one: torch.arange(len(one)) < like.best)
    )
    return Agreement(sum(len(one.above(like.least)) for one in ours), sure, best)


def alike(a: Detections, b: Detections, like: Likeness) -> Tensor:
    """(len(a), len(b)): which are one."""
    same = a.labels[:, None] == b.labels
    same &= (a.scores[:, None] - b.scores).abs() <= like.score
    close = (a.boxes[:, None] - b.boxes).abs().amax(-1) <= SIDE * TOLERANCES["boxes"]  # also of empty boxes
    return same & (close | (iou(a.boxes[:, None], b.boxes[None])[0] >= like.overlap))


def share(
    side: Sequence[Detections], found: Sequence[Tensor], counts: Callable[[Detections], Tensor]
) -> float:
    """Of the detections that count, those that were found."""
    hit = torch.cat([which[counts(one)] for one, which in zip(side, found, strict=True)])
    return float(hit.float().mean()) if len(hit) else 1.0


def nudged(images: Tensor, half: bool) -> Tensor:
    """Pictures that differ by little more than rounding."""
    generator = torch.Generator().manual_seed(0)
    return images * (1 + NUDGE[half] * torch.randn(images.shape, generator=generator))
