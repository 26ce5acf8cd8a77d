"""Deformable DETR against the official code: outputs, losses, matches and gradients on seeded weights."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import nn

from detrcli.plugins.registry import Model, resolve
from detrcli.types import Output

from .golden import Golden, aux_boxes, check_gradients, check_losses, golden, probe


class Case(NamedTuple):
    golden: str
    variant: str
    logits: float = 2e-4  # tolerances: five times what float64 differs by, see the goldens' README
    boxes: float = 3e-5
    losses: float = 1e-5
    gradients: float = 1e-3


CASES = [
    Case("deformable_two_stage", "r50-two-stage", 3.3e-4, 4e-5),
    # sampling gradients jump where a point crosses a pixel: scaling one layer by 1 + 1e-6 moves some norms by 3 %
    Case("deformable_refine", "r50-refine", 1.5e-3, 3e-4, 5e-5, 4e-2),
    Case("deformable", "r50"),
    Case("deformable_single_scale", "r50-single-scale"),
]
each_variant = pytest.mark.parametrize("case", CASES, ids=lambda case: case.variant)


class Run(NamedTuple):
    reference: Golden
    declared: Model
    model: nn.Module
    output: Output


@cache
def run(case: Case) -> Run:
    torch.set_num_threads(1)
    reference, declared = golden("deformable_detr", case.golden), resolve(f"deformable_detr/{case.variant}")
    model = declared.family.build_model(declared.variant.config, declared.variant.num_classes).eval()
    weights = {our_name(name): x for name, x in reference.weights.items()}
    model.load_state_dict(weights, strict=True)
    return Run(reference, declared, model, model(*reference.images))


def our_name(name: str) -> str:
    name = re.sub(r"^backbone\.0\.body\.", "backbone.body.", name).removeprefix("transformer.")
    name = re.sub(r"(layers\.\d+)\.(linear[12])", r"\1.ffn.\2", name)
    if crossed := re.match(r"(decoder\.layers\.\d+)\.norm([12])(.*)", name):
        name = f"{crossed[1]}.norm{3 - int(crossed[2])}{crossed[3]}"
    name = re.sub("^(input_proj|level_embed)", r"levels.\1", name)
    name = re.sub("^(query_embed|reference_points|enc_output|pos_trans)", r"queries.\1", name)
    name = name.removeprefix("decoder.") if "_embed" in name else name
    name = name.replace("class_embed.6", "queries.class_head").replace("bbox_embed.6", "queries.box_head")
    return name.replace("class_embed", "class_heads").replace("bbox_embed", "box_heads")


@each_variant
def test_outputs_equal_the_official_code(case: Case) -> None:
    reference, _, _, output = run(case)
    expected = reference.tensors
    torch.testing.assert_close(output.logits, expected["pred_logits"], atol=case.logits, rtol=0)
    torch.testing.assert_close(output.boxes, expected["pred_boxes"], atol=case.boxes, rtol=0)
    torch.testing.assert_close(aux_boxes(output), expected["aux_boxes"], atol=case.boxes, rtol=0)
    aux = torch.stack([probe(layer.logits, 512) for layer in output.aux])
    torch.testing.assert_close(aux, expected["aux_logits_probe"], atol=case.logits, rtol=0)


@each_variant
def test_detections_equal_the_official_code(case: Case) -> None:
    reference, declared, _, output = run(case)
    sizes = torch.tensor(reference.spec["post_sizes"])
    found = declared.family.postprocess(declared.variant.config, output, sizes)
    for i, detections in enumerate(found):
        expected = reference.tensors[f"post.{i}.scores"]
        torch.testing.assert_close(detections.scores, expected, atol=case.logits, rtol=0)
        apart = (expected.diff().abs() > 1e-4).all()  # labels of near-ties may come in another order
        assert not apart or torch.equal(detections.labels, reference.tensors[f"post.{i}.labels"])


def test_proposals_equal_the_official_code() -> None:
    reference, _, _, output = run(CASES[0])
    assert output.proposals is not None
    expected = reference.tensors
    torch.testing.assert_close(output.proposals.boxes, expected["enc_boxes"], atol=1e-5, rtol=0)
    objectness = output.proposals.logits[..., 0]
    torch.testing.assert_close(objectness, expected["enc_logits_class0"], atol=2e-5, rtol=0)
    some = probe(output.proposals.logits, 2048)
    torch.testing.assert_close(some, expected["enc_logits_probe"], atol=2e-5, rtol=0)


@each_variant
@pytest.mark.parametrize("targets", ["a", "b"])
def test_losses_equal_the_official_code(case: Case, targets: str) -> None:
    reference, declared, _, output = run(case)
    criterion = declared.family.build_criterion(declared.variant.config, declared.variant.num_classes)
    record = reference.spec["loss"][targets]
    check_losses(record, criterion(output, reference.targets(targets)), case.losses)


@pytest.mark.slow
@each_variant
def test_gradients_equal_the_official_code(case: Case) -> None:
    reference, declared, model, output = run(case)
    criterion = declared.family.build_criterion(declared.variant.config, declared.variant.num_classes)
    losses = criterion(output, reference.targets("a"))
    check_gradients(reference.spec["loss"]["a"], model, losses, our_name, case.gradients)


@each_variant
def test_parameters_are_as_many_as_declared(case: Case) -> None:
    reference, declared, model, _ = run(case)
    counted = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == declared.variant.params == reference.spec["num_params"]
    assert trained == reference.spec["num_trainable"]
