"""When a file is the model's: what is compared, on which pictures, and what is forgiven."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from detrcli.cli.export import _judged
from detrcli.export.pictures import SHAPES, batches, photograph
from detrcli.export.plan import Request
from detrcli.export.verify import HALF, Answer, Pair, agreeing, differing, verify, worst
from detrcli.plugins.contract import Preprocess
from detrcli.postprocess import sigmoid_topk
from detrcli.types import Detections, Output

SMALL, LARGE = Preprocess(short_side=64, long_side=128), Preprocess()


@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["small", "large"])
def test_pictures_differ_in_size_and_are_padded(preprocess):
    found = {name: (images, mask) for name, images, mask in batches(Request(format="pt2"), preprocess, 0)}
    assert list(found) == list(SHAPES)
    assert [len(images) for images, _ in found.values()] == [1, 2, 5]
    assert len({images.shape[2:] for images, _ in found.values()}) == 3
    one, two, five = (mask for _, mask in found.values())
    assert not one.any()
    assert two.any()
    assert five.flatten(1).any(1).sum() >= 3
    assert min(side for images, _ in found.values() for side in images.shape[2:]) >= 48
    for images, mask in found.values():
        assert images.masked_select(~mask[:, None]).std() > 0.5, "something is to be seen"


@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dynamic", [(), ("batch",), ("size",), ("batch", "size")])
def test_padding_is_verified_whatever_may_vary(dynamic, preprocess):
    size = None if "size" in dynamic else (64, 96)
    found = list(batches(Request(format="pt2", dynamic=dynamic, size=size), preprocess, 0))
    assert len(found) == len(SHAPES)
    for name, images, mask in found:
        assert mask.any() or "padded" not in name, f"{name} is not"
        assert len(images) == len(mask)
        assert len(images) == 1 or "batch" in dynamic
        if size is not None:
            assert images.shape[2:] == mask.shape[1:] == size
    assert sum("padded" in name for name, *_ in found) == 2


def test_the_photograph_is_one():
    assert photograph().shape == (3, 450, 384)
    assert photograph().float().std() > 40


def answer(seed=0, pictures=2, queries=30):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(pictures, queries, 5, generator=generator)
    boxes = torch.rand(pictures, queries, 4, generator=generator) / 4 + 0.25
    return Output(logits, boxes, extras={"iou": logits.mean(-1)})


def test_queries_are_a_set_and_all_their_answers_move_together():
    ours, order = answer(), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    theirs = Output(ours.logits[:, order], ours.boxes[:, order], extras={"iou": ours.extras["iou"][:, order]})
    assert apart(ours, theirs).largest == {"logits": 0, "boxes": 0, "iou": 0}
    theirs.extras["iou"] = ours.extras["iou"]
    assert apart(ours, theirs).largest["iou"] > 0.1
    moved = replace(ours, boxes=ours.boxes + torch.eye(30)[:, :4] * 0.01)
    assert apart(ours, moved).largest["boxes"] == pytest.approx(0.01, abs=1e-6)
    assert apart(ours, moved).median["boxes"] == 0


def apart(a, b):
    return differing(Answer(a, []), Answer(b, []), False)


def test_detections_are_a_set_too_with_their_boxes_and_labels():
    ours, order = found(), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    theirs = Detections(ours.scores[order], ours.labels[order], ours.boxes[order])
    compare = lambda other: differing(Answer(None, [ours]), Answer(None, [other]), False)  # noqa: E731
    assert compare(theirs).largest == {"scores": 0, "boxes": 0, "labels": 0}
    assert compare(replace(theirs, boxes=theirs.boxes + 10)).median["boxes"] == pytest.approx(0.01)
    assert compare(replace(theirs, labels=theirs.labels + 1)).largest["labels"] == 1
    assert compare(theirs.above(0.5)).largest["scores"] == math.inf


def found(seed=0, count=20, most=1.0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, generator=generator).sort(descending=True).values * most
    corner = torch.rand(count, 2, generator=generator) * 800
    boxes = torch.cat((corner, corner + 50 + 150 * torch.rand(count, 2, generator=generator)), 1)
    return Detections(scores, torch.arange(count) % 4, boxes)


def test_detections_agree_both_ways():
    ours = found()
    less, more = ours.above(0.5), found(seed=1)
    more = Detections(*(torch.cat(pair) for pair in zip(
        (ours.scores, ours.labels, ours.boxes), (more.scores, more.labels, more.boxes), strict=True
    )))  # fmt: skip
    assert agreeing([ours], [ours], HALF).sure == 1
    assert agreeing([ours], [less], HALF).sure < 1
    assert agreeing([ours], [more], HALF).sure == agreeing([more], [ours], HALF).sure < 0.7


def test_where_nothing_is_sure_the_best_must_agree():
    ours, other = found(most=0.2), found(seed=1, most=0.2)
    assert agreeing([ours], [ours], HALF).best == 1
    agreed = agreeing([ours], [other], HALF)
    assert (agreed.count, agreed.sure) == (0, 1)
    assert agreed.best < 0.2


def test_nothing_is_worse_than_no_number():
    for order in (1, -1):
        [value] = worst([{"a": 2.0}, {"a": math.nan}, {"a": math.inf}][::order]).values()
        assert not value < math.inf
    assert worst([{"a": 1.0}, {"a": 3.0, "b": 0.0}]) == {"a": 3.0, "b": 0.0}


class Moody(nn.Module):
    """A detector that chooses between equals: one query of thirty is another one every other time."""

    def __init__(self, calls=0, error=0.0, moods=2):
        super().__init__()
        self.calls, self.error, self.moods = calls, error, moods

    def forward(self, images, mask):
        self.calls += 1
        found = answer(pictures=len(images))
        found.logits[:, 7] += self.calls % self.moods
        return replace(found, logits=found.logits + self.error)


def report_of(model, exported, **options):
    after = lambda output, sizes: sigmoid_topk(output, sizes, 100)  # noqa: E731
    request = Request(format="pt2", **options)
    return verify(
        Pair(
            model=model,
            exported=exported,
            after=after,
            exported_after=after,
            preprocess=SMALL,
            request=request,
        )
    )


def test_the_same_answers_pass():
    report = report_of(Moody(moods=1), Moody(moods=1))
    assert report.passed
    assert all(case.steady and case.agreement == 1 for case in report.cases)
    assert report.largest["logits"] == 0
    assert report.judged("median") == {}


def test_a_steady_model_is_followed_in_every_number():
    report = report_of(Moody(moods=1), Moody(moods=2, calls=0))
    assert not report.passed
    assert "logits differ by 1" in report.reasons[0]


def test_a_choice_that_the_model_itself_makes_anew_is_forgiven():
    report = report_of(Moody(), Moody(calls=1))
    assert report.passed
    assert not report.cases[0].steady
    assert report.cases[0].largest["logits"] == pytest.approx(1)
    assert report.judged("median")["logits"] == 0
    assert report.judged("largest")["logits"] == 0, "of the batches where it chose alike"


def test_nothing_else_is_forgiven_then():
    report = report_of(Moody(), Moody(calls=1, error=0.01))
    assert not report.passed
    assert "the model is not steady there either" in report.reasons[0]


class Unsure(nn.Module):
    """A detector with random weights: many queries, and no score of 0.3."""

    def __init__(self, change=lambda output: output):
        super().__init__()
        self.change = change

    def forward(self, images, mask):
        found = answer(pictures=len(images))
        return self.change(replace(found, logits=found.logits / 4 - 3))


def as_in_16_bits(output):
    return replace(output, logits=output.logits.half().float(), boxes=output.boxes.half().float())


def zeros(output):
    nothing = {name: torch.zeros_like(value) for name, value in output.extras.items()}
    return Output(torch.zeros_like(output.logits), torch.zeros_like(output.boxes), extras=nothing)


def mixed_up(output):
    """All as it was, but the boxes are those of other queries."""
    return replace(output, boxes=output.boxes.roll(1, 1))


def sure_of_another(output):
    """One query in ten sees what is not there."""
    logits, boxes = output.logits.clone(), output.boxes.clone()
    logits[:, ::10, 0], boxes[:, ::10] = 5.0, 0.1
    return replace(output, logits=logits, boxes=boxes)


@pytest.mark.parametrize("postprocess", [False, True], ids=["answers", "detections"])
def test_a_half_file_passes_whose_answers_are_rounded(postprocess):
    report = report_of(Unsure(), Unsure(as_in_16_bits), half=True, postprocess=postprocess)
    assert report.passed
    assert {case.detections for case in report.cases} == {0}
    assert {case.agreement_of_best for case in report.cases} == {1}
    assert {case.rule for case in report.cases} == {"median"}


@pytest.mark.parametrize("postprocess", [False, True], ids=["answers", "detections"])
@pytest.mark.parametrize("wrong", [zeros, mixed_up, sure_of_another])
def test_a_half_file_does_not_pass_whose_answers_are_wrong(wrong, postprocess):
    report = report_of(Unsure(), Unsure(wrong), half=True, postprocess=postprocess)
    assert len(report.reasons) == 3


def test_the_command_says_which_difference_it_shows():
    steady, half = report_of(Unsure(), Unsure()), report_of(Unsure(), Unsure(as_in_16_bits), half=True)
    assert _judged(steady) == "largest difference: logits 0, boxes 0, iou 0"
    assert _judged(half).startswith("median difference: logits ")
    both = _judged(report_of(Moody(), Moody(calls=1)))
    assert both.startswith("largest difference on 2: logits 0, ")
    assert "; median difference on 1: logits 0, " in both
