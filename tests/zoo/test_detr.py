"""DETR against the official code: outputs, matches, losses, gradients, and every file layout that is in use."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import detrcli
from detrcli.errors import CheckpointError
from detrcli.nn.criterion import SetCriterion
from detrcli.plugins import Model, resolve
from detrcli.types import Output
from detrcli.weights.keymap import apply, revert
from detrcli.weights.load import load_state
from detrcli_detr.keymap import HUB, OFFICIAL

from .golden import Golden, aux_boxes, check_gradients, check_losses, check_matches, golden, probe

VARIANTS = {"r50": "detr_r50", "r50-dc5": "detr_r50_dc5"}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Run(NamedTuple):
    reference: Golden
    model: Model
    net: nn.Module
    output: Output


@cache
def run(variant: str) -> Run:
    reference, model = golden("detr", VARIANTS[variant]), resolve(f"detr/{variant}")
    net = model.build().eval()
    load_state(net, reference.official_state_dict(), model.family, model.config, layout="official")
    return Run(reference, model, net, net(*reference.images))


def our_name(official: str) -> str:
    return next(iter(apply(OFFICIAL, {official: torch.zeros(())}).tensors))


@each_variant
def test_outputs_equal_the_official_code(variant):
    reference, _, _, output = run(variant)
    expected = reference.tensors
    torch.testing.assert_close(output.logits, expected["pred_logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(output.boxes, expected["pred_boxes"], atol=3e-5, rtol=0)
    torch.testing.assert_close(aux_boxes(output), expected["aux_boxes"], atol=3e-5, rtol=0)
    aux = torch.stack([probe(layer.logits, 512) for layer in output.aux])
    torch.testing.assert_close(aux, expected["aux_logits_probe"], atol=2e-4, rtol=0)


@each_variant
def test_detections_equal_the_official_code(variant):
    reference, model, _, output = run(variant)
    found = model.postprocess(output, torch.tensor(reference.spec["post_sizes"]))
    for i, detections in enumerate(found):
        scores, order = reference.tensors[f"post.{i}.scores"].sort(descending=True, stable=True)
        torch.testing.assert_close(detections.scores, scores, atol=1e-4, rtol=0)
        sure = scores.diff().abs().gt(1e-5)  # neighbours this close may change places
        apart = torch.cat((sure[:1], sure[1:] & sure[:-1], sure[-1:]))
        boxes, labels = (
            reference.tensors[f"post.{i}.boxes"][order],
            reference.tensors[f"post.{i}.labels"][order],
        )
        assert apart.sum() > 20
        torch.testing.assert_close(detections.boxes[apart], boxes[apart], atol=0.02, rtol=0)
        assert torch.equal(detections.labels[apart], labels[apart])


@each_variant
@pytest.mark.parametrize("case", ["a", "b"])
def test_losses_and_matches_equal_the_official_code(variant, case):
    reference, model, _, output = run(variant)
    criterion = model.family.build_criterion(model.config, 91)
    assert isinstance(criterion, SetCriterion)
    record, targets = reference.spec["loss"][case], reference.targets(case)
    check_matches(record, criterion.matcher, output, targets)
    check_losses(record, criterion(output, targets), absolute=5e-6)  # the golden's own boxes are off by 3e-6


@each_variant
def test_gradients_equal_the_official_code(variant):
    reference, model, net, output = run(variant)
    losses = model.family.build_criterion(model.config, 91)(output, reference.targets("a"))
    check_gradients(reference.spec["loss"]["a"], net, losses, our_name)


@each_variant
def test_what_is_frozen_is_what_the_official_code_freezes(variant):
    reference, _, net, _ = run(variant)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == reference.spec["num_trainable"]


def hub_state(reference: Golden, variant: str) -> dict[str, torch.Tensor]:
    """The golden's weights under the names of a Hub repository, by the recorded map (not by ours)."""
    import json

    from .golden import FOLDER

    table = json.loads((FOLDER / "detr" / f"{VARIANTS[variant]}.hub.json").read_text())["map"]
    state = {}
    for name, source in table.items():
        if source is None:
            state[name] = torch.zeros(())
        elif isinstance(source, list):
            state[name] = reference.weights[source[0]][source[1] : source[2]].clone()
        else:
            state[name] = reference.weights[source].clone()
    return state


NEWER = (
    ("conv_encoder.model", "model"),
    (".fc1.", ".mlp.fc1."),
    (".fc2.", ".mlp.fc2."),
    ("out_proj", "o_proj"),
)


def spelled_newer(name: str) -> str:
    for old, new in NEWER:
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("spelling", ["classic", "new", "segmentation"])
def test_hub_files_load_with_nothing_left_over(spelling, tmp_path):
    reference, _, net, _ = run("r50")
    state = hub_state(reference, "r50")
    if spelling == "new":
        state = {spelled_newer(name): tensor for name, tensor in state.items()}
    if spelling == "segmentation":
        state = {f"detr.{name}": tensor for name, tensor in state.items()} | {
            "mask_head.lay1.weight": torch.zeros(2)
        }
    save_file(state, tmp_path / "model.safetensors")
    other = detrcli.create_model("detr/r50")
    report = detrcli.load_weights(other, tmp_path / "model.safetensors")
    assert report.layout == "hub"
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), net.state_dict().values(), strict=True)
    )


def test_our_weights_go_back_to_the_official_and_hub_names():
    reference, _, net, _ = run("r50")
    official = revert(OFFICIAL, net.state_dict())
    assert official.keys() == reference.weights.keys()
    assert all(torch.equal(official[name], tensor) for name, tensor in reference.weights.items())
    hub, wanted = revert(HUB, net.state_dict()), hub_state(reference, "r50")
    assert hub.keys() == {name for name in wanted if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(hub[name], wanted[name]) for name in hub)


def test_a_checkpoint_of_another_variant_says_what_differs(tmp_path):
    _, _, net, _ = run("r50")
    save_file(net.state_dict(), tmp_path / "r50.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: .*layer3") as caught:
        detrcli.load_weights(detrcli.create_model("detr/r101"), tmp_path / "r50.safetensors")
    assert caught.value.hint


def test_other_class_counts_are_refused_or_taken_over_by_name(tmp_path):
    _, _, net, _ = run("r50")
    save_file(net.state_dict(), tmp_path / "r50.safetensors")
    three = detrcli.create_model("detr/r50", num_classes=3)
    with pytest.raises(CheckpointError, match="class_head"):
        detrcli.load_weights(three, tmp_path / "r50.safetensors")
    classes = detrcli.types.Categories((1, 2, 3), ("a", "b", "c"))
    report = detrcli.load_weights(three, tmp_path / "r50.safetensors", classes=classes)
    assert set(report.remade) == {"class_head.weight", "class_head.bias"}


@pytest.mark.parity
def test_the_real_transformers_package_agrees(tmp_path):
    """Their model with random weights, saved as it saves, gives the same boxes here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="resnet50", out_indices=[4], use_pretrained_backbone=False
        ),
        num_labels=91,
        encoder_layers=2,
        decoder_layers=2,
        attention_dropout=0.0,
    )
    theirs = transformers.DetrForObjectDetection(config).eval()
    with torch.no_grad():  # as they are born, all queries answer alike
        theirs.model.query_position_embeddings.weight.mul_(300)
        for layer in theirs.bbox_predictor.layers:
            layer.weight.mul_(4)
    theirs.save_pretrained(tmp_path)
    ours = detrcli.create_model("detr/r50", encoder_layers=2, decoder_layers=2).eval()
    report = detrcli.load_weights(ours, tmp_path / "model.safetensors")
    assert (report.missing, report.unexpected) == ((), ())
    images, mask = golden("detr", "detr_r50").images
    with torch.no_grad():
        wanted, found = theirs(pixel_values=images, pixel_mask=(~mask).long()), ours(images, mask)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.boxes, wanted.pred_boxes, atol=2e-5, rtol=0)
    assert found.boxes.std(1).min() > 1e-4


def test_padded_features_are_never_read():
    """Whatever stands in the padding of the feature map, the transformer does not see it."""
    _, _, net, _ = run("r50")
    images, mask = golden("detr", "detr_r50").images
    scream = net.backbone.register_forward_hook(
        lambda module, args, out: [
            (torch.where(padding[:, None], 1e4, features), padding) for features, padding in out
        ]
    )
    with torch.no_grad():
        quiet = run("r50").output
        loud = net(images, mask)
    scream.remove()
    torch.testing.assert_close(loud.logits, quiet.logits.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loud.boxes, quiet.boxes.detach(), atol=1e-5, rtol=0)
