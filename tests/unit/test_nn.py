"""Shared network parts against the official functions' values, and the laws of the matcher and the criterion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from detrcli.boxes import cxcywh_to_xyxy, giou
from detrcli.errors import NonFiniteError
from detrcli.nn.criterion import SetCriterion
from detrcli.nn.layers import FrozenBatchNorm2d, inverse_sigmoid
from detrcli.nn.losses import focal_cost, focal_loss, softmax_cost
from detrcli.nn.matcher import HungarianMatcher
from detrcli.nn.position import sine_boxes, sine_positions
from detrcli.types import Output, Target
from tests.conftest import GOLDENS

SOFTMAX = SetCriterion(kind="softmax", class_cost=1, class_weight=1)
FOCAL = SetCriterion(kind="focal", class_cost=2, class_weight=2)


def golden(name):
    return load_file(GOLDENS / "detr" / f"{name}.safetensors")


@pytest.mark.parametrize(("name", "offset"), [("detr", 0.0), ("deformable", -0.5)])
def test_official_positions(name, offset):
    g = golden("fn_position")
    ours = sine_positions(g["mask_padded"].bool(), 256, offset=offset)
    assert torch.allclose(ours, g[name], atol=1e-5)


def test_official_box_positions_and_inverse_sigmoid():
    g = golden("fn_position")
    logits = g["proposal_logits"]
    assert torch.allclose(sine_boxes(logits.sigmoid(), 128), g["proposal_pos_embed"], atol=1e-5)
    assert torch.allclose(inverse_sigmoid(g["inverse_sigmoid_in"]), g["inverse_sigmoid_out"], atol=1e-6)


def test_frozen_norm_is_batch_norm_in_eval():
    ours, theirs = FrozenBatchNorm2d(5), torch.nn.BatchNorm2d(5).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = torch.rand(5) + 0.5
        getattr(ours, name).copy_(value)
        getattr(theirs, name).data.copy_(value)
    x = torch.randn(2, 5, 3, 4)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert not list(ours.parameters())


@pytest.mark.parametrize(
    ("name", "cost", "weight"), [("detr", softmax_cost, 1), ("deformable", focal_cost, 2)]
)
def test_official_matching(name, cost, weight):
    g = golden("fn_losses")
    matcher = HungarianMatcher(class_cost=cost, class_weight=weight)
    targets = [Target(g[f"match.{name}.labels{i}"], g[f"match.{name}.boxes{i}"]) for i in (0, 1)]
    logits, boxes = g[f"match.{name}.pred_logits"][None], g[f"match.{name}.pred_boxes"][None]
    costs = matcher.cost(logits, boxes, targets)
    matches = matcher(logits, boxes, targets)
    first = 0
    for i, target in enumerate(targets):
        count = len(target.labels)
        assert torch.allclose(costs[0, i, :count].T, g[f"match.{name}.cost{i}"], atol=1e-5)
        mine = matches.places[1] == i
        pairs = {
            (int(q), int(t) - first)
            for q, t in zip(matches.places[2][mine], matches.target[mine], strict=True)
        }
        assert pairs == set(
            zip(g[f"match.{name}.rows{i}"].tolist(), g[f"match.{name}.cols{i}"].tolist(), strict=True)
        )
        first += count


def test_official_focal_loss():
    g = golden("fn_losses")
    logits = g["focal.logits"].requires_grad_()
    image, query, label = g["focal.targets"].nonzero(as_tuple=True)
    places = (torch.zeros_like(image), image, query)
    loss = focal_loss(logits[None], places, label) / 3
    loss.sum().backward()
    assert torch.allclose(loss[0], g["focal.loss_ce_times_queries"][0], rtol=1e-5)
    # the golden's gradient is that of the mean over queries, before the official factor of the query count
    assert torch.allclose(logits.grad / logits.shape[1], g["focal.grad"], rtol=1e-4, atol=1e-7)


def random_case(seed, layers=3, counts=(2, 0, 5), queries=7, classes=4, extra=0):
    torch.manual_seed(seed)
    shape = (layers, len(counts), queries)
    logits = torch.randn(*shape, classes + extra, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(*shape, 4, dtype=torch.float64).mul(0.6).add(0.2).requires_grad_()
    targets = [
        Target(torch.randint(classes, (n,)), torch.rand(n, 4, dtype=torch.float64).mul(0.6).add(0.2))
        for n in counts
    ]
    return logits, boxes, targets


def as_output(logits, boxes):
    layers = [Output(a, b) for a, b in zip(logits, boxes, strict=True)]
    return Output(layers[-1].logits, layers[-1].boxes, aux=tuple(layers[:-1]))


def written_out(criterion, logits, boxes, targets):
    """The losses as the papers write them, one layer and image after the other, with plain torch functions."""
    total, count = torch.zeros((), dtype=torch.float64), max(1, sum(len(t.labels) for t in targets))
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        matches = criterion.matcher(layer_logits[None], layer_boxes[None], targets)
        image, query = matches.places[1], matches.places[2]
        label = torch.cat([t.labels for t in targets])[matches.target]
        wanted = torch.cat([t.boxes for t in targets])[matches.target]
        guess = layer_boxes[image, query]
        if criterion.kind == "softmax":
            classes = torch.full(layer_logits.shape[:2], layer_logits.shape[-1] - 1)
            classes[image, query] = label
            weight = torch.ones(layer_logits.shape[-1], dtype=torch.float64)
            weight[-1] = criterion.no_object
            ce = F.cross_entropy(layer_logits.transpose(1, 2), classes, weight)
        else:
            onehot = torch.zeros_like(layer_logits)
            onehot[image, query, label] = 1
            p = layer_logits.sigmoid()
            bce = F.binary_cross_entropy_with_logits(layer_logits, onehot, reduction="none")
            p_right = p * onehot + (1 - p) * (1 - onehot)
            alpha = 0.25 * onehot + 0.75 * (1 - onehot)
            ce = (alpha * (1 - p_right) ** 2 * bce).sum() / count
        l1 = F.l1_loss(guess, wanted, reduction="sum") / count
        overlap = (1 - giou(cxcywh_to_xyxy(guess), cxcywh_to_xyxy(wanted))).sum() / count
        total = total + criterion.class_weight * ce + 5 * l1 + 2 * overlap
    return total


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.sampled_from(["softmax", "focal"]),
)
def test_criterion_is_the_papers_sum_with_its_gradient(seed, counts, kind):
    criterion = SOFTMAX if kind == "softmax" else FOCAL
    logits, boxes, targets = random_case(seed, counts=counts, extra=kind == "softmax")
    ours = criterion(as_output(logits, boxes), targets).total
    wanted = written_out(criterion, logits, boxes, targets)
    assert torch.allclose(ours, wanted, rtol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, (logits, boxes)),
        torch.autograd.grad(wanted, (logits, boxes), allow_unused=True),
        strict=True,
    ):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-10)


@given(st.permutations(range(7)))
def test_permuting_queries_changes_nothing(order):
    logits, boxes, targets = random_case(0)
    before = FOCAL(as_output(logits, boxes), targets).total
    after = FOCAL(as_output(logits[:, :, list(order)], boxes[:, :, list(order)]), targets).total
    assert torch.allclose(before, after, rtol=1e-12)


@pytest.mark.parametrize("counts", [(1, 0, 4, 3), (1, 0, 0, 0)], ids=["many objects", "less than one a part"])
@pytest.mark.parametrize("criterion", [SOFTMAX, FOCAL], ids=["softmax", "focal"])
def test_parts_of_a_batch_add_up_to_the_whole(criterion, counts):
    """Accumulated or spread over ranks, the gradient is that of the whole batch: no part normalises on its own."""
    logits, boxes, targets = random_case(3, counts=counts, extra=criterion is SOFTMAX)
    whole = criterion(as_output(logits, boxes), targets).total
    mean = sum(len(t.labels) for t in targets) / 2
    parts = [
        criterion(as_output(logits[:, s], boxes[:, s]), targets[s], mean).total / 2
        for s in (slice(0, 2), slice(2, 4))
    ]
    assert torch.allclose(whole, sum(parts), rtol=1e-10)


def test_more_objects_than_queries_leaves_some_unmatched():
    logits, boxes, targets = random_case(1, counts=(9, 1), queries=4)
    matches = FOCAL.matcher(logits, boxes, targets)
    assert (matches.places[1] == 0).sum() == 3 * 4
    assert torch.isfinite(FOCAL(as_output(logits, boxes), targets).total)


@pytest.mark.parametrize("criterion", [SOFTMAX, FOCAL], ids=["softmax", "focal"])
def test_no_objects_anywhere_still_trains_classes(criterion):
    logits, boxes, targets = random_case(2, counts=(0, 0), extra=criterion is SOFTMAX)
    losses = criterion(as_output(logits, boxes), targets)
    losses.total.backward()
    assert losses.terms["bbox"] == 0
    assert logits.grad.abs().sum() > 0


def test_predictions_that_are_not_finite_are_named():
    logits, boxes, targets = random_case(4)
    boxes = boxes.detach().clone()
    boxes[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 for picture 2"):
        FOCAL.matcher(logits, boxes, targets)


def test_half_precision_predictions_are_scored_in_float32():
    logits, boxes, targets = random_case(5)
    targets = [Target(t.labels, t.boxes.float()) for t in targets]
    half = FOCAL(as_output(logits.bfloat16(), boxes.bfloat16()), targets).total
    assert half.dtype == torch.float32
    assert torch.isclose(half, FOCAL(as_output(logits.float(), boxes.float()), targets).total, rtol=0.05)
