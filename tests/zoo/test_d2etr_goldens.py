"""D²ETR against the authors' code: fused maps, outputs, proposals, scores and losses on seeded weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detrcli.plugins.registry import Model, resolve
from detrcli.types import Output, Target
from detrcli.weights.load import LoadReport, load_state
from detrcli_d2etr.criterion import D2etrCriterion

from .golden import Golden, check_losses, golden, probe

CASES = {"vanilla": "d2etr_pvt_v2_b2_li", "deformable": "deformable_d2etr_pvt_v2_b2_li"}
each_variant = pytest.mark.parametrize("variant", CASES)
LOGITS, BOXES = 2e-4, 3e-5


class Run(NamedTuple):
    reference: Golden
    declared: Model
    model: nn.Module
    report: LoadReport
    output: Output
    fused: list[Tensor]
    rows: Tensor  # (B, Q): which of our queries answers in the golden's place


@cache
def run(variant: str, name: str) -> Run:
    """The model while training, when it answers everything, with nothing dropped."""
    torch.set_num_threads(1)
    reference, declared = golden("d2etr", name), resolve(f"d2etr/{variant}")
    config = declared.config
    declared = declared.configured(
        replace(config, dropout=0.0, fuse_drop_path=0.0, backbone=replace(config.backbone, drop_path=0.0))
    )
    model = declared.build()
    report = load_state(model, reference.official_state_dict(), declared.family, declared.config)
    fused: list[Tensor] = []
    model.fusion.register_forward_hook(lambda module, given, maps: fused.extend(x for x, _ in maps))
    output = model.train()(*reference.images)
    return Run(reference, declared, model, report, output, list(fused), rows_of(output, reference))


def rows_of(output: Output, reference: Golden) -> Tensor:
    """Proposals of nearly equal objectness may come in another order: queries are aligned by their tokens."""
    if output.proposals is None:
        return torch.arange(output.logits.shape[1]).expand(2, -1)
    ours = output.proposals.logits[..., 0].topk(output.logits.shape[1]).indices
    theirs = reference.tensors["topk_proposals"]
    assert torch.equal(ours.sort().values, theirs.sort().values)
    return ours.argsort().gather(1, theirs.argsort().argsort())


def golden_run(variant: str) -> Run:
    return run(variant, CASES[variant])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def aligned(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows.view(*rows.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


@each_variant
def test_official_checkpoints_convert_totally(variant: str) -> None:
    reference, declared, model, report, *_ = golden_run(variant)
    assert report.layout == "official"
    assert report.problems == 0
    assert not report.dropped
    assert len(report.kept) == len(model.state_dict()) == len(reference.spec["manifest"])
    assert (
        sum(p.numel() for p in model.parameters()) == declared.variant.params == reference.spec["num_params"]
    )


@each_variant
def test_fused_maps_equal_the_official_code(variant: str) -> None:
    reference, _, _, _, _, fused, _ = golden_run(variant)
    compared = 0
    for i, x in enumerate(fused):
        expected = reference.tensors.get(f"backbone.{i}.probe")  # vanilla keeps the map it decodes
        if expected is not None:
            close(probe(x[:, :32], 4096), expected, 2e-4)
            compared += 1
    assert compared == {"vanilla": 1, "deformable": 4}[variant]


@each_variant
def test_answers_equal_the_official_code(variant: str) -> None:
    reference, _, _, _, output, _, rows = golden_run(variant)
    expected = reference.tensors
    close(aligned(output.logits, rows), expected["pred_logits"], LOGITS)
    check_layer(output, rows, expected, "")
    for i, layer in enumerate(output.aux):
        close(probe(aligned(layer.logits, rows), 4096), expected[f"aux.{i}.pred_logits.probe"], LOGITS)
        check_layer(layer, rows, expected, f"aux.{i}.")


def check_layer(layer: Output, rows: Tensor, expected: dict[str, Tensor], prefix: str) -> None:
    close(aligned(layer.boxes, rows), expected[f"{prefix}pred_boxes"], BOXES)
    close(aligned(layer.extras["iou"], rows), expected[f"{prefix}pred_ious"][..., 0], LOGITS)
    if "centerness" in layer.extras:
        close(aligned(layer.extras["centerness"], rows), expected[f"{prefix}pred_centers"][..., 0], LOGITS)
        close(aligned(layer.extras["reference"], rows), expected[f"{prefix}refpts"], BOXES)


def test_queries_that_are_apart_equal_the_official_code() -> None:
    """In the other golden of the vanilla model all queries nearly coincide."""
    reference, _, _, _, output, _, _ = run("vanilla", "d2etr_pvt_v2_b2_li__spread")
    assert output.logits.std(1).mean() > 0.2
    close(output.logits, reference.tensors["pred_logits"], LOGITS)
    close(output.boxes, reference.tensors["pred_boxes"], BOXES)
    close(output.extras["iou"], reference.tensors["pred_ious"][..., 0], LOGITS)


def test_proposals_equal_the_official_code() -> None:
    reference, _, _, _, output, _, _ = golden_run("deformable")
    proposals, expected = output.proposals, reference.tensors
    assert proposals is not None
    close(proposals.logits[..., 0], expected["enc_outputs.objectness"], 2e-5)
    close(probe(proposals.logits, 4096), expected["enc_outputs.pred_logits.probe"], 2e-5)
    close(proposals.boxes, expected["enc_outputs.pred_boxes"], 1e-5)
    close(proposals.extras["iou"], expected["enc_outputs.pred_ious"][..., 0], 2e-5)
    close(proposals.extras["centerness"], expected["enc_outputs.pred_centers"][..., 0], 2e-5)
    close(proposals.extras["reference"], expected["enc_outputs.refpts"], 1e-5)


@each_variant
def test_token_logits_equal_the_official_code(variant: str) -> None:
    reference, declared, _, _, output, _, _ = golden_run(variant)
    for i in range(declared.config.decoded_maps):
        found = output.extras[f"tokens_{i}"].permute(0, 2, 3, 1)
        close(probe(found, 4096), reference.tensors[f"enc_tokens.{i}.probe"], 1e-4)


@each_variant
def test_losses_equal_the_official_code(variant: str) -> None:
    reference, declared, _, _, output, _, _ = golden_run(variant)
    check_losses(reference.spec["loss"], criterion(declared)(output, targets_of(reference)))


@each_variant
def test_matches_equal_the_official_code(variant: str) -> None:
    reference, declared, _, _, output, _, rows = golden_run(variant)
    found = criterion(declared).layers.matcher(output.logits[None], output.boxes[None], targets_of(reference))
    for image in (0, 1):
        ours = found.places[1] == image
        pairs = dict(zip(found.places[2][ours].tolist(), found.target[ours].tolist(), strict=True))
        queries = rows[image][reference.tensors[f"match.{image}.src"]].tolist()
        objects = (reference.tensors[f"match.{image}.tgt"] + 3 * image).tolist()  # three objects in the first
        assert pairs == dict(zip(queries, objects, strict=True))


@each_variant
def test_detections_equal_the_official_code(variant: str) -> None:
    reference, declared, _, _, output, _, _ = golden_run(variant)
    found = declared.postprocess(output, torch.tensor([[320, 416], [288, 352]]))
    for i, detections in enumerate(found):
        close(detections.scores, reference.tensors[f"post.{i}.scores"], 1e-5)
        assert set(detections.labels.tolist()) == set(reference.tensors[f"post.{i}.labels"].tolist())


def test_what_only_the_loss_needs_is_not_computed_outside_training() -> None:
    reference, _, model, _, output, _, _ = golden_run("deformable")
    model.eval()
    with torch.no_grad():
        answer = model(*reference.images)
    model.train()
    assert answer.proposals is None
    assert not [name for name in answer.extras if name.startswith("tokens")]
    close(answer.logits.sort(1).values, output.logits.sort(1).values, 1e-4)


def criterion(declared: Model) -> D2etrCriterion:
    made = declared.family.build_criterion(declared.config, declared.variant.num_classes)
    assert isinstance(made, D2etrCriterion)
    return made


def targets_of(reference: Golden) -> list[Target]:
    stored = reference.tensors
    unpacked = [np.unpackbits(stored[f"targets.{i}.masks.packed"].numpy(), axis=-1) for i in (0, 1)]
    return [
        Target(
            stored[f"targets.{i}.labels"],
            stored[f"targets.{i}.boxes"],
            {"masks": torch.from_numpy(unpacked[i])},
        )
        for i in (0, 1)
    ]
