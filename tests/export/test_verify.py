"""When a file is the model's: what is compared, on which pictures, and what is forgiven."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from detrcli.export.pictures import SHAPES, batches, photograph
from detrcli.export.plan import Request
from detrcli.export.verify import Pair, differing, largest, verify
from detrcli.plugins.contract import Preprocess
from detrcli.postprocess import sigmoid_topk
from detrcli.types import Output

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
    assert differing(ours, theirs, False, largest) == {"logits": 0, "boxes": 0, "iou": 0}
    theirs.extras["iou"] = ours.extras["iou"]
    assert differing(ours, theirs, False, largest)["iou"] > 0.1
    moved = replace(ours, boxes=ours.boxes + torch.eye(30)[:, :4] * 0.01)
    assert differing(ours, moved, False, largest)["boxes"] == pytest.approx(0.01, abs=1e-6)


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


def report_of(model, exported):
    after = lambda output, sizes: sigmoid_topk(output, sizes, 100)  # noqa: E731
    request = Request(format="pt2")
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


def test_a_steady_model_is_followed_in_every_number():
    report = report_of(Moody(moods=1), Moody(moods=2, calls=0))
    assert not report.passed
    assert "logits differ by 1" in report.reasons[0]


def test_a_choice_that_the_model_itself_makes_anew_is_forgiven():
    report = report_of(Moody(), Moody(calls=1))
    assert report.passed
    assert not report.cases[0].steady


def test_nothing_else_is_forgiven_then():
    report = report_of(Moody(), Moody(calls=1, error=0.01))
    assert not report.passed
    assert "the model is not steady there either" in report.reasons[0]
