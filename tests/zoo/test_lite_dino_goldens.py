"""Lite-DINO and DINO against the official codes: outputs, losses, gradients on seeded weights, in the official names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from detrcli.plugins.registry import Model, resolve
from detrcli.types import Output
from detrcli.weights.keymap import apply, revert
from detrcli_lite_detr import denoising
from detrcli_lite_detr.denoising import Draws

from .golden import Golden, aux_boxes, check_gradients, check_losses, golden


class Case(NamedTuple):
    golden: str
    model: str
    encoder: Mapping[str, Any] = MappingProxyType({})
    queries: int = 100


LITE = Case("lite_dino_h3l1_2x3_q100", "lite_dino/h3l1-2x3")
DINO = Case("dino_r50_q100", "dino/r50")
WHOLE = [
    Case("lite_dino_h3l1_2x3", "lite_dino/h3l1-2x3", queries=900),
    Case("lite_dino_h3l1_6x1", "lite_dino/h3l1-6x1", queries=900),
    Case("lite_dino_h2l2_2x3", "lite_dino/h2l2-2x3", queries=900),
    Case("dino_r50", "dino/r50", queries=900),
]
RANKED = [
    Case("lite_dino_h3l1_3x2_q100", "lite_dino/h3l1-2x3", {"blocks": 2}),
    Case("lite_dino_h3l1_2x3_plain_q100", "lite_dino/h3l1-2x3", {"key_aware": False}),
    Case("lite_dino_h3l1_2x3_own_keys_q100", "lite_dino/h3l1-2x3", {"own_keys": True}),
    Case("lite_dino_swin_t_h3l1_2x3_q100", "lite_dino/swin-t-h3l1-2x3"),
    LITE,
    DINO,
]
CASES = {case.golden: case for case in WHOLE + RANKED}


class Run(NamedTuple):
    reference: Golden
    declared: Model
    model: nn.Module
    output: Output
    tokens: Tensor  # (B, Q): the token of the memory that each query comes from
    memory: Tensor


def configured(case: Case) -> Model:
    declared = resolve(case.model)
    config = declared.config
    if declared.family.name == "dino":
        return declared.configured(replace(config, num_queries=case.queries))
    host = replace(config.host, num_queries=case.queries)
    return declared.configured(replace(config, host=host, encoder=replace(config.encoder, **case.encoder)))


def loaded(case: Case) -> tuple[Golden, Model, nn.Module]:
    declared, reference = configured(case), golden("lite_detr", case.golden)
    model = declared.build().eval()
    official = declared.family.key_maps["official"](declared.config)
    model.load_state_dict(apply(official, reference.official_state_dict()).tensors)
    return reference, declared, model


@lru_cache(maxsize=2)
def run(name: str) -> Run:
    """The answer of a case; the last two are kept, which are those that most tests ask for."""
    torch.set_num_threads(1)
    reference, declared, model = loaded(CASES[name])
    seen: dict[str, Any] = {}
    model.get_submodule("encoder").register_forward_hook(lambda *a: seen.update(memory=a[2].detach()))
    model.get_submodule("queries.class_head").register_forward_hook(
        lambda *a: seen.update(scores=a[2].detach())
    )
    with torch.set_grad_enabled(CASES[name] in (LITE, DINO)):
        output = model(*reference.images)
    scores = seen["scores"].amax(-1)
    assert output.proposals is not None
    tokens = scores.topk(output.proposals.logits.shape[1], dim=1).indices
    return Run(reference, declared, model, output, tokens, seen["memory"])


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [case.golden for case in cases])


def sliced(reference: Golden, logits: Tensor) -> Tensor:
    return logits[..., ::7] if "sliced" in reference.spec else logits


@each(WHOLE)
def test_answers_of_all_queries_equal_the_official_code(name: str) -> None:
    """Contents are zero here, so that the order of 900 close scores does not matter: both sides are sorted by token."""
    reference, declared, model, output, tokens, memory = run(name)
    expected = reference.tensors
    torch.testing.assert_close(memory[:, ::29, ::8], expected["memory_sample"], atol=1e-4, rtol=0)
    ours, theirs = tokens.argsort(1), expected["topk_indices"].long().argsort(1)
    assert torch.equal(tokens.sort(1).values, expected["topk_indices"].long().sort(1).values)
    for i in range(len(ours)):
        logits = sliced(reference, output.logits)[i, ours[i]]
        torch.testing.assert_close(logits, expected["pred_logits"][i, theirs[i]], atol=2e-4, rtol=0)
        boxes = output.boxes[i, ours[i]]
        torch.testing.assert_close(boxes, expected["pred_boxes"][i, theirs[i]], atol=2e-5, rtol=0)
    assert (
        sum(p.numel() for p in model.parameters()) == declared.variant.params == reference.spec["parameters"]
    )


@each(RANKED)
def test_answers_equal_the_official_code(name: str) -> None:
    reference, _, _, output, tokens, memory = run(name)
    expected = reference.tensors
    torch.testing.assert_close(memory[:, ::29, ::8], expected["memory_sample"], atol=1e-4, rtol=0)
    assert torch.equal(tokens, expected["topk_indices"].long())
    torch.testing.assert_close(sliced(reference, output.logits), expected["pred_logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(output.boxes, expected["pred_boxes"], atol=2e-5, rtol=0)
    torch.testing.assert_close(aux_boxes(output), expected["aux_boxes"], atol=2e-5, rtol=0)
    assert output.proposals is not None
    torch.testing.assert_close(output.proposals.boxes, expected["interm_boxes"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("targets", ["a", "b"])
@each([LITE, DINO])
def test_losses_equal_the_official_code(name: str, targets: str) -> None:
    reference, declared, _, output, _, _ = run(name)
    criterion = declared.family.build_criterion(declared.config, 91)
    check_losses(reference.spec["loss"][targets], criterion(output, reference.targets(targets)))


@pytest.mark.slow
@each([LITE, DINO])
def test_gradients_equal_the_official_code(name: str) -> None:
    reference, declared, model, output, _, _ = run(name)
    criterion = declared.family.build_criterion(declared.config, 91)
    losses = criterion(output, reference.targets("a"))
    official = declared.family.key_maps["official"](declared.config)
    names = apply(official, reference.official_state_dict()).origin
    ours = {theirs: name for name, origin in names.items() for theirs in origin}
    check_gradients(reference.spec["loss"]["a"], model, losses, ours.__getitem__, 4e-2)


def test_detections_equal_the_official_code() -> None:
    reference, declared, _, output, _, _ = run(DINO.golden)
    found = declared.postprocess(output, torch.tensor(reference.spec["post_sizes"]))
    for i, detections in enumerate(found):
        assert len(detections) == 300
        expected = reference.tensors[f"post.{i}.scores"]
        torch.testing.assert_close(detections.scores[:100], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("targets", ["a", "b"])
def test_denoising_equals_the_official_code(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, noisy = golden("lite_detr", DINO.golden), golden("lite_detr", "dino_r50_q100_dn")
    declared, model = run(DINO.golden)[1:3]
    expected = {n.removeprefix(f"{targets}."): x for n, x in noisy.tensors.items()}
    objects = noisy.targets(targets)
    rows = 2 * noisy.spec["loss"][targets]["groups"]
    monkeypatch.setattr(denoising, "draw", lambda *_: stored_draws(expected, rows))
    with torch.no_grad():
        output = model(*reference.images, objects)
    logits, boxes = output.extras["denoised_logits"], output.extras["denoised_boxes"]
    torch.testing.assert_close(boxes[-1], expected["dn_pred_boxes"], atol=3e-5, rtol=0)
    torch.testing.assert_close(logits[-1].mean(-1), expected["dn_pred_logits_mean"], atol=1e-4, rtol=0)
    plain = run(DINO.golden).output
    torch.testing.assert_close(output.logits, plain.logits.detach(), atol=2e-4, rtol=0)
    criterion = declared.family.build_criterion(declared.config, 91)
    check_losses(noisy.spec["loss"][targets], criterion(output, objects), 5e-5)


def stored_draws(golden_case: dict[str, Tensor], rows: int) -> Draws:
    def draw(name: str) -> Tensor:
        values = golden_case[f"draw.{name}"]
        return values.unflatten(0, (rows, len(values) // rows))

    return Draws(draw("label_flip_u"), draw("label_new"), draw("box_sign01").float() * 2 - 1, draw("box_u"))


@pytest.mark.parametrize(("blocks", "entries"), [(1, 632), (2, 638), (3, 644)])
def test_official_files_have_as_many_entries_as_the_released_ones(blocks: int, entries: int) -> None:
    declared = configured(Case("", "lite_dino/h3l1-2x3", {"blocks": blocks}, 900))
    with torch.device("meta"):
        state = declared.build().state_dict()
    names = revert(declared.family.key_maps["official"](declared.config), state)
    assert len(names) == entries
