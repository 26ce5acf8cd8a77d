"""Counting against arithmetic done by hand, and against what the papers print."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d, roi_align

from detrcli.errors import UsageError
from detrcli.plugins import resolve
from detrcli.profile import run as profiling
from detrcli.profile.counting import count
from detrcli.profile.run import COCO100, against_published, coco100_sizes, parse_size, profile

H, W = 48, 64


class Wrap(nn.Module):
    """A detector around one operation on images (1, 3, H, W)."""

    def __init__(self, part, function):
        super().__init__()
        self.part, self.function = part, function

    def forward(self, images, mask):
        return self.function(self.part, images)


@pytest.mark.parametrize(
    ("part", "function", "macs"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), lambda m, x: m(x), 3 * 8 * 9 * (H // 2) * (W // 2)),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), lambda m, x: m(x), 6 * 9 * H * W),
        (nn.Linear(W, 10), lambda m, x: m(x), 3 * H * W * 10),
        (nn.LayerNorm(W), lambda m, x: m(x), 0),
        (
            nn.MultiheadAttention(W, 4, batch_first=True).eval(),
            lambda m, x: m(x[0], x[0], x[0]),
            3 * (4 * H * W * W + 2 * H * H * W),
        ),
        (
            nn.Identity(),
            lambda m, x: F.grid_sample(x, x.new_empty(1, 5, 7, 2), align_corners=False),
            4 * 3 * 5 * 7,
        ),
        (
            nn.Identity(),
            lambda m, x: roi_align(x, x.new_empty(9, 5), (7, 7), sampling_ratio=2),
            4 * 4 * 9 * 3 * 49,
        ),
        (
            nn.Identity(),
            lambda m, x: deform_conv2d(x, x.new_empty(1, 18, H, W), x.new_empty(8, 3, 3, 3), padding=1),
            9 * H * W * 3 * 8 + 9 * H * W * 3 * 5,
        ),
    ],
    ids=["conv", "grouped conv", "linear", "norm", "attention", "grid_sample", "roi_align", "deform_conv"],
)
def test_each_operator_counts_as_by_hand(part, function, macs):
    found = count(Wrap(part, function).to("meta"), {"heads": ("part",)}, 1, (H, W))
    assert found.total == macs
    assert not found.unknown


def test_an_operator_nobody_knows_is_named_not_dropped():
    @torch.library.custom_op("detrcli_test::strange", mutates_args=())
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    strange.register_fake(torch.empty_like)
    found = count(Wrap(nn.Identity(), lambda m, x: strange(strange(x))), {}, 1, (H, W))
    assert dict(found.unknown) == {"detrcli_test.strange": 2}


def test_costs_grow_with_the_batch_and_belong_to_parts():
    model = resolve("detr/tiny")
    one, two = (profile(model, size=(64, 96), batch=b) for b in (1, 2))
    assert one.macs == pytest.approx(two.macs)
    whole = {part: value for part, value in one.by_part.items() if "." not in part}
    assert sum(whole.values()) == pytest.approx(one.macs)
    assert {"backbone", "projection", "encoder", "decoder", "heads"} <= set(whole)
    assert one.by_part["decoder.0"] == pytest.approx(one.by_part["decoder.1"])


def test_grouping_the_hundred_sizes_changes_nothing_that_is_printed():
    table = json.loads((files(profiling.__package__) / "coco100.json").read_text())["sizes"]
    exact = Counter((min(s), max(s)) for s in table)
    assert sum(coco100_sizes().values()) == sum(exact.values()) == 100
    model = resolve("detr/r50")
    with torch.device("meta"):
        module = model.build()
    mean = (
        sum(count(module, model.family.parts, 1, size).total * times for size, times in exact.items()) / 100
    )
    assert profile(model).macs == pytest.approx(mean, rel=1e-3)


# over the hundred sizes, except that DINO's and Lite DETR's tables agree with 800 x 1066
MET = {
    "detr/r50": COCO100,
    "detr/r101": COCO100,
    "deformable_detr/r50": COCO100,
    "deformable_detr/pvt2": COCO100,
    "dino/r50": (800, 1066),
    "lite_dino/h3l1-2x3": (800, 1066),
    "lite_dino/h3l1-6x1": (800, 1066),
    "lite_dino/h2l2-2x3": (800, 1066),
}


@pytest.mark.parametrize("name", MET)
def test_published_gflops_are_met_within_two_per_cent(name):
    (difference,) = [
        d for d in against_published(profile(resolve(name), size=MET[name])) if d.what == "GFLOPs"
    ]
    assert abs(difference.percent) <= 2.0, f"{difference.counted:.1f} against {difference.published}"


@pytest.mark.parametrize("text", ["800", "0x0", "16x800", "800xwide", ""])
def test_sizes_that_mean_nothing_are_refused(text):
    with pytest.raises(UsageError):
        parse_size(text)
