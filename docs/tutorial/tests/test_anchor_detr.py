"""The promises of every plugin, and the laws of this paper."""

from __future__ import annotations

import math

import pytest
import torch

from detrcli.nn.position import sine_positions
from detrcli.testing import CHECKS, models_of
from detrcli_anchor_detr.model import encode


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", models_of("anchor_detr"), ids=lambda model: model.name)
def test_conformance(model, check):
    check(model)


def test_an_anchor_on_a_pixel_has_the_encoding_of_that_pixel():
    pixels = sine_positions(torch.zeros(1, 5, 8, dtype=torch.bool), 32, offset=-0.5)  # (1, 32, 5, 8)
    centre = torch.tensor([[(6 + 0.5) / 8, (2 + 0.5) / 5]])
    assert torch.allclose(encode(centre, 32)[0], pixels[0, :, 2, 6], atol=1e-4)


def test_an_untrained_box_lies_on_its_anchor():
    model = models_of("anchor_detr")[1].build(3)
    for parameter in model.box_head.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    boxes = model.eval()(torch.randn(1, 3, 64, 64)).boxes[0]
    assert torch.allclose(boxes[:, :2], model.anchors, atol=1e-5)


def test_moving_an_anchor_moves_what_it_attends_to():
    """Encodings of near points are more alike than those of far ones."""
    x = torch.linspace(0.1, 0.9, 9)
    codes = encode(torch.stack((x, torch.full_like(x, 0.5)), 1), 64)
    likeness = torch.cosine_similarity(codes[:1], codes)
    assert (likeness[:4].diff() < 0).all()
    assert math.isclose(likeness[0].item(), 1, rel_tol=1e-5)
