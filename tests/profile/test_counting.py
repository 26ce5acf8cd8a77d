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

from detrcli import ops
from detrcli.errors import UsageError
from detrcli.plugins import resolve
from detrcli.profile import sizes as profiling
from detrcli.profile.counting import count
from detrcli.profile.memory import saved_for_backward, trained
from detrcli.profile.run import build_on_meta, memory, profile
from detrcli.profile.sizes import coco100_sizes, parse_size

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


@pytest.mark.parametrize(
    "text", ["800", "0x0", "16x800", "800xwide", "", "²x64", "9" * 5000 + "x64", "10000000x10000000"]
)
def test_sizes_that_mean_nothing_are_refused(text):
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("part", "extra", "more"),
    [
        (nn.LayerNorm(W), "norms", 5 * 3 * H * W),
        (nn.GroupNorm(1, 3), "norms", 5 * 3 * H * W),
        (nn.Softmax(-1), "softmax", 3 * 3 * H * W),
    ],
    ids=["layer norm", "group norm", "softmax"],
)
def test_what_some_counters_add_is_added_when_asked(part, extra, more):
    wrapped = Wrap(part, lambda m, x: m(x)).to("meta")
    assert count(wrapped, {}, 1, (H, W)).total == 0
    assert count(wrapped, {}, 1, (H, W), frozenset({extra})).total == more


@pytest.mark.parametrize(
    ("name", "parts"), [("detr/r50", ("backbone",)), ("deformable_detr/r50", ("backbone", "encoder"))]
)
def test_fvcore_agrees_where_both_can_count(name, parts):
    """Convolutions, linear layers and sampling; fvcore does not see the products of fused attention."""
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model = resolve(name)
    ours = profile(model, size=(96, 128)).by_part
    theirs = fvcore.FlopCountAnalysis(
        Plain(model.build().eval()), (torch.zeros(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool))
    )
    theirs.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with ops.use("reference"):  # fvcore traces, and does not know operators of ours
        theirs.total()
    for part in parts:
        operators = theirs.by_module_and_operator()[f"model.{part}"]
        assert ours[part] == sum(v for k, v in operators.items() if "norm" not in k and "upsample" not in k)


class Plain(nn.Module):
    """A detector that answers in tensors, as a trace wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, mask):
        output = self.model(images, mask)
        return output.logits, output.boxes


def test_our_native_operators_cost_what_plain_torch_does():
    from detrcli.ops import dispatch, msda, msda_fused

    if dispatch.wheel.cpu is None:
        pytest.skip(dispatch.wheel.reason)
    shapes = ((6, 8), (3, 4))
    with torch.device("meta"):
        value, offsets = torch.zeros(1, 60, 2, 4), torch.zeros(1, 5, 2, 2, 3, 2)
        weights, reference, logits = (
            torch.zeros(1, 5, 2, 2, 3),
            torch.zeros(1, 5, 2, 2),
            torch.zeros(1, 5, 2, 6),
        )
    native, flat = torch.ops.detrcli_ops, [6, 8, 3, 4]
    calls = [
        lambda: native.msda(value, flat, offsets, weights),
        lambda: msda(value, shapes, offsets, weights),
        lambda: native.msda_fused(value, flat, reference, offsets, logits, None),
        lambda: msda_fused(value, shapes, reference, offsets, logits),
    ]
    for call in calls:
        found = count(Wrap(nn.Identity(), lambda m, x, c=call: c()), {}, 1, (H, W))
        assert found.total == 4 * 5 * 2 * 2 * 3 * 4
        assert not found.unknown


def test_three_quarters_of_the_positions_are_rarely_updated():
    """The argument of Lite DETR, from its default: full layers alternate with layers of the coarser positions only."""
    found = profile(resolve("lite_deformable/h3l1-2x3"), size=(800, 1066))
    assert found.tokens == (
        100 * 134,
        50 * 67,
        25 * 34,
        13 * 17,
    )  # the coarsest is a strided convolution of the last
    fine, *coarse = found.tokens
    layers = [found.queries[f"encoder.{i}"] for i in range(6)]
    assert layers == [sum(coarse), fine + sum(coarse)] * 3
    assert fine / (fine + sum(coarse)) > 0.75


def test_activations_alive_at_once_are_counted_and_freed():
    size, pictures = 3 * H * W * 4, 3 * H * W * 4 + H * W

    def chain(m, x):
        for _ in range(5):
            x = x + 1  # two of them live at any time, one of them the answer before
        return x

    assert count(Wrap(nn.Identity(), chain), {}, 1, (H, W)).peak == pictures + 2 * size
    stacked = Wrap(nn.Identity(), lambda m, x: torch.stack([x + i for i in range(5)]))
    assert count(stacked, {}, 1, (H, W)).peak == pictures + 10 * size


def test_what_the_backward_pass_needs_is_counted_once():
    linear = Wrap(nn.Linear(W, 10), lambda m, x: (m(x) ** 2).sum()).to("meta")
    # the input of the linear layer is kept for its weight, its answer for the square; the weight is a parameter
    assert saved_for_backward(linear, 1, (H, W)) == 4 * (3 * H * W + 3 * H * 10)


def test_attention_takes_little_more_than_its_answer():
    attend = Wrap(nn.Identity(), lambda m, x: F.scaled_dot_product_attention(x, x, x))
    found = count(attend, {}, 1, (40 * H, W))
    assert found.total == 2 * 3 * (40 * H) ** 2 * W
    pictures = 40 * H * W * (3 * 4 + 1)
    assert found.peak == pictures + 3 * 40 * H * W * 4
    tall = memory(resolve("detr/tiny"), size=(640, 640))
    assert tall.inference < 2**26, "measured on a CPU: 54 MiB"


def test_training_holds_at_least_what_predicting_does(monkeypatch):
    monkeypatch.setattr("detrcli.profile.run.saved_for_backward", lambda *_: 0)  # as if all were frozen
    found = memory(model := resolve("detr/tiny"), size=(64, 64))
    assert found.training == trained(build_on_meta(model)) + found.inference


def test_memory_of_training_covers_weights_gradients_and_moments():
    model = resolve("detr/tiny")
    found = memory(model, size=(64, 64))
    params = [p.numel() * 4 * (4 if p.requires_grad else 1) for p in build_on_meta(model).parameters()]
    assert found.training > sum(params)
    assert found.weights == 4 * model.variant.params
    assert memory(model, size=(64, 64), batch=3).inference > 2 * found.inference
