"""The parts of D²ETR on their own: in float64 against the authors' code, and by the laws they must obey."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detrcli.nn.matcher import Matches
from detrcli.types import Output, Target
from detrcli_d2etr.fusion import CecaBlock, pool_map, to_map
from detrcli_d2etr.location_aware import (
    CENTERNESS,
    IOU,
    REFERENCE,
    LocationAwareLoss,
)
from detrcli_d2etr.token_labels import EXTENT, TokenLabelLoss

GOLDEN = Path(__file__).parents[1] / "goldens" / "d2etr" / "d2etr_ceca_losses.safetensors"
SIZES = [(9, 12), (5, 6), (3, 3)]


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def block(stored: dict[str, Tensor], residual: str) -> CecaBlock:
    made = CecaBlock(32, 4, 128, scales=3, pool=3, residual=residual).double()
    weights = {
        name.removeprefix("ceca.weight.").replace("dwconv.dwconv", "dwconv"): x
        for name, x in stored.items()
        if name.startswith("ceca.weight.")
    }
    made.load_state_dict(weights)
    return made


@pytest.mark.parametrize(
    ("residual", "expected"),
    [("official", "ceca.output"), ("prenorm", "ceca.textbook_prenorm_output")],
)
def test_both_readings_of_the_ceca_block(stored, residual, expected):
    x0, x1, x2 = (stored[f"ceca.x{i}"] for i in range(3))
    pools = [pool_map(to_map(x, size), 3, None) for x, size in zip((x0, x1), SIZES, strict=False)]
    same(block(stored, residual)(x2, SIZES[2], pools), stored[expected])


def test_gradients_of_the_ceca_block_reach_all_scales(stored):
    xs = [stored[f"ceca.x{i}"].clone().requires_grad_() for i in range(3)]
    pools = [pool_map(to_map(x, size), 3, None) for x, size in zip(xs[:2], SIZES, strict=False)]
    out = block(stored, "official")(xs[2], SIZES[2], pools)
    for i, gradient in enumerate(torch.autograd.grad(out, xs, stored["ceca.grad_output"])):
        same(gradient, stored[f"ceca.grad_x{i}"])


def location_case(stored) -> tuple[Output, list[Target], Matches]:
    leaf = {name: stored[f"loss.{name}"].clone().requires_grad_() for name in NAMES}
    extras = {
        IOU: leaf["pred_ious"][..., 0],
        CENTERNESS: leaf["pred_centers"][..., 0],
        REFERENCE: leaf["refpts"],
    }
    output = Output(torch.zeros(2, 4, 5, dtype=torch.float64), leaf["pred_boxes"], extras=extras)
    output.extras["leaf"] = leaf  # type: ignore[assignment]
    targets = [Target(stored[f"loss.tgt{i}.labels"], stored[f"loss.tgt{i}.boxes"]) for i in (0, 1)]
    queries = torch.cat([stored["loss.match0.src"], stored["loss.match1.src"]])
    objects = torch.cat([stored["loss.match0.tgt"], stored["loss.match1.tgt"] + 3])
    images = torch.tensor([0, 0, 0, 1])
    return output, targets, Matches((torch.zeros_like(images), images, queries), objects)


NAMES = ("pred_ious", "pred_centers", "pred_boxes", "refpts")


def test_location_aware_losses_and_their_gradients(stored):
    output, targets, matches = location_case(stored)
    loss = LocationAwareLoss(detach_iou_target=False, centerness_of_box=False)
    values = loss([output], targets, matches, torch.tensor(4.0))
    same(values["center"].sum(), stored["loss.center"])
    same(values["iouaware"].sum(), stored["loss.iouaware"])
    leaf = output.extras["leaf"]
    boxes, ious = torch.autograd.grad(
        values["iouaware"].sum(), (leaf["pred_boxes"], leaf["pred_ious"]), retain_graph=True
    )
    same(boxes, stored["loss.iouaware_grad_boxes"])
    same(ious, stored["loss.iouaware_grad_ious"])
    (centers,) = torch.autograd.grad(values["center"].sum(), leaf["pred_centers"])
    same(centers, stored["loss.center_grad"])


def test_a_detached_iou_target_leaves_the_boxes_alone(stored):
    output, targets, matches = location_case(stored)
    loss = LocationAwareLoss(detach_iou_target=True, centerness_of_box=False)
    values = loss([output], targets, matches, torch.tensor(4.0))
    same(values["iouaware"].sum(), stored["loss.iouaware"])
    boxes = output.extras["leaf"]["pred_boxes"]
    assert torch.autograd.grad(values["iouaware"].sum(), boxes, allow_unused=True)[0] is None


def test_centerness_may_be_of_the_box(stored):
    output, targets, matches = location_case(stored)
    moved = Output(
        output.logits,
        output.boxes,
        extras=output.extras | {REFERENCE: output.boxes[..., :2]},
    )
    count = torch.tensor(4.0)
    of_box = LocationAwareLoss(detach_iou_target=False, centerness_of_box=True)
    of_reference = LocationAwareLoss(detach_iou_target=False, centerness_of_box=False)
    found = of_box([output], targets, matches, count)["center"]
    same(found, of_reference([moved], targets, matches, count)["center"])
    assert (found - stored["loss.center"]).abs().item() > 1e-3


def token_case(stored) -> tuple[dict[str, Tensor], list[Target]]:
    logits = [stored[f"loss.token_logits{i}"].clone().requires_grad_() for i in (0, 1)]
    extras = {f"tokens_{i}": x.permute(0, 3, 1, 2) for i, x in enumerate(logits)}
    targets = [
        Target(
            stored[f"loss.tgt{i}.labels"],
            stored[f"loss.tgt{i}.boxes"],
            {"masks": stored[f"loss.tgt{i}.masks"]},
        )
        for i in (0, 1)
    ]
    extras[EXTENT] = torch.ones(2, 2)
    extras["leaf"] = logits  # type: ignore[assignment]
    return extras, targets


def test_token_losses_and_their_gradients(stored):
    extras, targets = token_case(stored)
    leaf = extras.pop("leaf")
    values = TokenLabelLoss(any_object=0)(extras, targets, torch.tensor(4.0))
    # the official labels are pooled in float32
    same(values["token_focal"], stored["loss.token_focal"], 2e-9)
    same(values["token_dice"], stored["loss.token_dice"], 2e-9)
    gradients = torch.autograd.grad(values["token_focal"] + values["token_dice"], leaf)
    for i, gradient in enumerate(gradients):
        same(gradient, stored[f"loss.token_grad{i}"], 2e-9)
