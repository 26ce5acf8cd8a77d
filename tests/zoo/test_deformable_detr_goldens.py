"""Deformable DETR against the official code: outputs, losses, gradients and weights in every layout, on seeded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from detrcli.plugins.registry import Model, resolve
from detrcli.types import Output
from detrcli.weights.keymap import apply, revert
from detrcli.weights.load import load_state

from .golden import Golden, aux_boxes, check_gradients, check_losses, golden, probe, proposing


class Case(NamedTuple):
    golden: str
    variant: str
    logits: float = 2e-4  # tolerances: five times what float64 differs by, see the goldens' README
    boxes: float = 3e-5
    losses: float = 3e-5
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
    model = declared.build().eval()
    report = load_state(model, reference.official_state_dict(), declared.family, declared.config)
    assert report.layout == "official"
    return Run(reference, declared, model, proposing(model)(*reference.images))


def our_name(case: Case) -> Callable[[str], str]:
    reference, declared, _, _ = run(case)
    mapped = apply(declared.family.key_maps["official"](declared.config), reference.official_state_dict())
    ours = {theirs: name for name, origin in mapped.origin.items() for theirs in origin}
    return ours.__getitem__


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
    found = declared.postprocess(output, torch.tensor(reference.spec["post_sizes"]))
    for i, detections in enumerate(found):
        expected = {name: reference.tensors[f"post.{i}.{name}"] for name in ("scores", "labels", "boxes")}
        torch.testing.assert_close(detections.scores, expected["scores"], atol=case.logits, rtol=0)
        clear = _apart(expected["scores"], 2 * case.logits)  # near-ties may come in another order
        assert clear.any()
        assert torch.equal(detections.labels[clear], expected["labels"][clear])
        pixels = case.boxes * 1000
        torch.testing.assert_close(detections.boxes[clear], expected["boxes"][clear], atol=pixels, rtol=0)


def _apart(scores: Tensor, gap: float) -> Tensor:
    """Which of the sorted scores differ from both neighbours."""
    wide = -scores.diff() > gap
    edge = wide.new_ones(1)
    return torch.cat((edge, wide)) & torch.cat((wide, edge))


def test_proposals_equal_the_official_code() -> None:
    reference, _, _, output = run(CASES[0])
    assert output.proposals is not None
    expected = reference.tensors
    torch.testing.assert_close(output.proposals.boxes, expected["enc_boxes"], atol=1e-5, rtol=0)
    objectness = output.proposals.logits[..., 0]
    torch.testing.assert_close(objectness, expected["enc_logits_class0"], atol=2e-5, rtol=0)
    some = probe(output.proposals.logits, 2048)
    torch.testing.assert_close(some, expected["enc_logits_probe"], atol=2e-5, rtol=0)
    top = objectness.topk(300, dim=1).indices
    assert torch.equal(top.sort(1).values, expected["topk_proposals"].sort(1).values)


@each_variant
@pytest.mark.parametrize("targets", ["a", "b"])
def test_losses_equal_the_official_code(case: Case, targets: str) -> None:
    reference, declared, _, output = run(case)
    criterion = declared.family.build_criterion(declared.config, 91)
    record = reference.spec["loss"][targets]
    check_losses(record, criterion(output, reference.targets(targets)), case.losses)


@each_variant
@pytest.mark.parametrize("targets", ["a", "b"])
def test_matches_equal_the_official_code(case: Case, targets: str) -> None:
    reference, declared, _, output = run(case)
    matcher = declared.family.build_criterion(declared.config, 91).layers.matcher
    wanted = reference.targets(targets)
    layers = (*output.aux, output)
    logits, boxes = torch.stack([o.logits for o in layers]), torch.stack([o.boxes for o in layers])
    matches = matcher(logits, boxes, wanted)
    first = [0, len(wanted[0].labels)]  # where each image's objects start
    found = {
        (int(layer), int(image), int(query), int(t) - first[image])
        for layer, image, query, t in zip(*matches.places, matches.target, strict=True)
    }
    names = [*map(str, range(5)), "last"]
    record = reference.spec["loss"][targets]["indices"]
    assert found == {
        (names.index(name), image, query, target)
        for name in names
        for image, (queries, targets_) in enumerate(record[name])
        for query, target in zip(queries, targets_, strict=True)
    }


@each_variant
def test_gradients_equal_the_official_code(case: Case) -> None:
    reference, declared, model, output = run(case)
    criterion = declared.family.build_criterion(declared.config, 91)
    losses = criterion(output, reference.targets("a"))
    check_gradients(reference.spec["loss"]["a"], model, losses, our_name(case), case.gradients)


@each_variant
def test_parameters_are_as_many_as_in_the_official_code(case: Case) -> None:
    reference, declared, model, _ = run(case)
    counted = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == declared.variant.params == reference.spec["num_params"]
    assert trained == reference.spec["num_trainable"]


def _everything(name: str) -> bool:
    return True


def _without_copies(name: str) -> bool:
    """As safetensors drops shared tensors: the first name stays."""
    return "model.decoder.class_embed" not in name and "model.decoder.bbox_embed" not in name


def _below_the_decoder(name: str) -> bool:
    return not name.startswith(("class_embed", "bbox_embed"))


@pytest.mark.parametrize("holds", [_everything, _without_copies, _below_the_decoder])
@each_variant
def test_hub_files_load_whole_whatever_copies_they_hold(case: Case, holds: Callable[[str], bool]) -> None:
    reference, declared, model, _ = run(case)
    refined, two_stage = declared.config.refine, declared.config.two_stage
    tensors = {name: x for name, x in _hub_tensors(reference).items() if holds(name)}
    if holds is _below_the_decoder and not two_stage:  # such files keep what has no name below the decoder
        kept = "class_embed" if refined else ("class_embed.0", "bbox_embed.0")
        tensors |= {n: x for n, x in _hub_tensors(reference).items() if n.startswith(kept)}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = load_state(model, tensors, declared.family, declared.config)
    assert report.layout == "hub"
    assert len(report.dropped) == 4
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name


def _hub_tensors(reference: Golden) -> dict[str, Tensor]:
    """The golden's weights in the layout of the Hub: slices of fused projections, counters, every shared name."""
    layout = json.loads(reference.path.with_suffix(".hub.json").read_text())
    weights = reference.official_state_dict()
    tensors = {}
    for name, source in layout["map"].items():
        if source is None:
            tensors[name] = torch.zeros((), dtype=torch.int64)
        elif isinstance(source, list):
            tensors[name] = weights[source[0]][source[1] : source[2]].clone()
        else:
            tensors[name] = weights[source].clone()
    return tensors


@each_variant
def test_files_are_written_with_exactly_the_foreign_names(case: Case) -> None:
    reference, declared = golden("deformable_detr", case.golden), resolve(f"deformable_detr/{case.variant}")
    with torch.device("meta"):
        state = declared.build().state_dict()
    official = revert(declared.family.key_maps["official"](declared.config), state)
    assert set(official) == set(reference.spec["manifest"]) | set(reference.spec["aliases"])
    layout = json.loads(reference.path.with_suffix(".hub.json").read_text())["map"]
    hub = revert(declared.family.key_maps["hub"](declared.config), state)
    assert set(hub) == {name for name, source in layout.items() if source is not None}
