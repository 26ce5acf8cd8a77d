"""Deformable convolution and RoIAlign: every form against torchvision's operators, at the edges too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrcli_dynamic_detr.operators import deform_conv2d, roi_align
from detrcli_dynamic_detr.pooling import Pooling, draw, in_pixels

FORMS = ("auto", "operator", "grid_sample")
SIZES = torch.tensor([[400, 600], [383, 511]])  # of the two pictures, padded to the larger


def convolution(
    batch: int, height: int, width: int, stride: int, spread: float, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    return {
        "x": normal(batch, 6, height, width),
        "offset": normal(batch, 18, *out) * spread,
        "mask": normal(batch, 9, *out).sigmoid(),
        "weight": normal(5, 6, 3, 3),
        "bias": normal(5),
    }


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 0.7, 5.0]),
)
def test_forms_of_deformable_convolution_agree(batch, height, width, stride, spread):
    given = convolution(batch, height, width, stride, spread)
    wanted = torchvision.ops.deform_conv2d(
        given["x"], given["offset"], given["weight"], given["bias"], stride, 1, mask=given["mask"]
    )
    for form in FORMS:
        torch.testing.assert_close(deform_conv2d(**given, stride=stride, form=form), wanted)


def test_without_offsets_and_masks_it_is_a_convolution():
    given = convolution(2, 5, 6, 2, 0.0)
    given["mask"] = torch.ones_like(given["mask"])
    plain = F.conv2d(given["x"], given["weight"], given["bias"], 2, 1)
    torch.testing.assert_close(deform_conv2d(**given, stride=2), plain)


def test_its_gradients_are_the_operators():
    given = {name: value.requires_grad_() for name, value in convolution(2, 5, 4, 1, 1.5).items()}
    grads = [
        torch.autograd.grad(deform_conv2d(**given, form=form).square().sum(), tuple(given.values()))
        for form in FORMS
    ]
    for ours in (grads[0], grads[2]):
        for a, b in zip(ours, grads[1], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_raised(form):
    """bfloat16 could not even count the columns of a map of 300."""
    given = convolution(1, 2, 300, 1, 0.5)
    low = {name: value.to(torch.bfloat16) for name, value in given.items()}
    answer = deform_conv2d(**low, form=form)
    assert answer.dtype == torch.float32
    exact = deform_conv2d(**{name: value.double() for name, value in low.items()}, form=form)
    torch.testing.assert_close(answer.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pyramid() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((50, 75), (25, 38), (13, 19), (7, 10), (4, 5))
    return [torch.randn(2, 3, *shape, dtype=torch.float64) for shape in shapes]


def pooling(form: str = "auto") -> Pooling:
    return Pooling(
        levels=(3, 4, 5, 6, 7), size=7, samples=2, canonical_size=224, canonical_level=4, form=form
    )


@pytest.mark.parametrize("form", ["auto", "operator"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_pooling_on_the_canvas_is_pooling_on_each_boxs_level(pyramid, form, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, 12, 4, generator=generator, dtype=torch.float64) ** 2
    pool = pooling(form)
    pooled = pool(draw(pyramid), boxes, SIZES)
    corners = in_pixels(boxes, SIZES)
    levels = pool.level_of(corners)
    for image, (own, level) in enumerate(zip(corners, levels, strict=True)):
        for box, i, answer in zip(own, level.tolist(), pooled[image], strict=True):
            x = pyramid[i][image : image + 1]
            wanted = torchvision.ops.roi_align(x, [box[None]], 7, 2.0 ** -(i + 3), 2, aligned=True)
            torch.testing.assert_close(answer, wanted[0].flatten(1).T)


def test_gradients_of_pooling_are_the_operators(pyramid):
    boxes = torch.rand(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    maps = [x.clone().requires_grad_() for x in pyramid]
    grads = [
        torch.autograd.grad(pooling(form)(draw(maps), boxes, SIZES).square().sum(), maps)
        for form in ("auto", "operator")
    ]
    for ours, torchvisions in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchvisions)


def test_levels_follow_sizes():
    sides = torch.tensor([0.0, 1.0, 111.0, 113.0, 223.0, 225.0, 449.0, 897.0, 1793.0, 5000.0])
    square = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), -1)
    assert (pooling().level_of(square) + 3).tolist() == [3, 3, 3, 3, 3, 4, 5, 6, 7, 7]
    long = torch.tensor([[0.0, 0.0, 4.0, 1333.0]])  # huge aspect ratio: a small area
    assert pooling().level_of(long).tolist() == [0]


@pytest.mark.parametrize("form", ["auto", "operator"])
@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0.5, 0.0, 0.0),  # collapsed
        (0.5, 0.5, -0.3, 0.2),  # inside out
        (-3.0, 7.0, 0.1, 0.1),  # far outside
        (0.5, 0.5, 1e6, 1e-9),  # endless and flat
        (float("nan"), 0.5, 0.1, 0.1),
        (float("inf"), 0.5, float("inf"), 0.1),
    ],
)
def test_boxes_are_pooled_inside_the_picture_whatever_they_are(pyramid, form, box):
    boxes = torch.tensor(box, dtype=torch.float64).expand(2, 1, 4)
    corners = in_pixels(boxes, SIZES)
    assert (corners >= 0).all()
    assert (corners[..., :2] <= corners[..., 2:]).all()
    assert (corners <= SIZES.flip(1).repeat(1, 2)[:, None]).all()
    ones = [torch.ones_like(x) for x in pyramid]
    pooled = pooling(form)(draw(ones), boxes, SIZES)
    torch.testing.assert_close(pooled, torch.ones_like(pooled))  # never the blank part of the canvas


def test_no_gradient_reaches_boxes(pyramid):
    boxes = torch.full((2, 1, 4), 0.5, dtype=torch.float64, requires_grad=True)
    assert not pooling()(draw(pyramid), boxes, SIZES).requires_grad


def test_roi_align_takes_half_precision():
    x = torch.randn(1, 4, 9, 9)
    boxes = torch.tensor([[[1.0, 2.0, 7.0, 6.0]]])
    low = roi_align(x.bfloat16(), boxes, size=3, samples=2)
    torch.testing.assert_close(low, roi_align(x.bfloat16().float(), boxes, size=3, samples=2))
