"""Boxes: conversions undo each other, overlaps obey their laws, goldens of the official code are met."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from detrcli import boxes
from tests.conftest import GOLDENS

number = st.floats(0, 1, width=32)
box = st.tuples(number, number, number, number)


def corners(values):
    return boxes.cxcywh_to_xyxy(torch.tensor(values, dtype=torch.float64))


@given(st.lists(box, min_size=1, max_size=5))
def test_conversions_undo_each_other(values):
    b = torch.tensor(values, dtype=torch.float64)
    assert torch.allclose(boxes.xyxy_to_cxcywh(boxes.cxcywh_to_xyxy(b)), b, atol=1e-12)
    xyxy = boxes.cxcywh_to_xyxy(b)
    assert torch.allclose(boxes.xywh_to_xyxy(boxes.xyxy_to_xywh(xyxy)), xyxy, atol=1e-12)


@given(box, box)
def test_giou_is_symmetric_bounded_and_below_iou(a, b):
    a, b = corners(a), corners(b)
    giou, (iou, _) = boxes.giou(a, b), boxes.iou(a, b)
    assert torch.isclose(giou, boxes.giou(b, a), atol=1e-9)
    assert -1 - 1e-9 <= giou <= iou + 1e-9 <= 1 + 2e-9


@given(box)
def test_a_box_overlaps_itself_wholly(a):
    a = corners(a)
    overlap = boxes.giou(a, a)
    assert torch.isclose(overlap, torch.ones(()).double(), atol=1e-6) or boxes.area(a) < 1e-12


def test_official_overlaps():
    g = load_file(GOLDENS / "detr" / "fn_losses.safetensors")
    a, b = (boxes.cxcywh_to_xyxy(g[f"giou.boxes{i}_cxcywh"]) for i in (1, 2))
    iou, union = boxes.iou(a[:, None], b[None])
    finite = torch.isfinite(g["giou.iou"])  # the official code answers NaN for two empty boxes; we answer 0
    assert torch.allclose(iou[finite], g["giou.iou"][finite], atol=1e-6)
    assert torch.isfinite(iou).all()
    assert torch.allclose(union, g["giou.union"], atol=1e-6)
    known = torch.isfinite(g["giou.giou"])
    assert torch.allclose(boxes.giou(a[:, None], b[None])[known], g["giou.giou"][known], atol=1e-6)


def test_official_giou_gradient():
    g = load_file(GOLDENS / "detr" / "fn_losses.safetensors")
    guess = g["giou.loss_pred_xyxy"].requires_grad_()
    loss = (1 - boxes.giou(guess, g["giou.loss_target_xyxy"])).sum()
    loss.backward()
    assert torch.allclose(loss, g["giou.loss_sum"][0], rtol=1e-5)
    assert torch.allclose(guess.grad, g["giou.loss_grad_pred"], rtol=1e-4, atol=1e-5)
