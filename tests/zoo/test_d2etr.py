"""Laws of D²ETR, on its tiny variant: every combination trains, any backbone fits, switches do what they say."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detrcli
from detrcli.errors import UsageError
from detrcli.plugins.registry import Model, resolve
from detrcli.train.optim import parameter_groups
from detrcli.types import Output, Target
from detrcli_d2etr import fusion as fusion_module
from detrcli_d2etr import token_labels as token_module
from detrcli_d2etr.fusion import (
    CrossScaleFusion,
    FusingStage,
    drop_rates,
    pool_map,
    pooling_weights,
    to_tokens,
)
from detrcli_d2etr.location_aware import CENTERNESS, IOU, location_aware_scores
from detrcli_d2etr.token_labels import EXTENT, TokenClasses, box_masks, token_labels

TINY = resolve("d2etr/tiny")
KINDS: dict[str, dict[str, Any]] = {
    "deformable": {},
    "vanilla": {
        "decoder": "dense",
        "decoded_maps": 1,
        "refine": False,
        "two_stage": False,
        "centerness": False,
        "coarser_map": False,
    },
    "dense, two stages": {"decoder": "dense"},
    "deformable, learned queries": {"two_stage": False},
    "pre-norm, masked": {"ceca_residual": "prenorm", "masked_pooling": True, "fuse_blocks": 2},
    "nothing extra": {"iou": False, "centerness": False, "token_labels": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def variant(kind: str = "deformable", **changes: Any) -> Model:
    return TINY.configured(replace(TINY.config, **KINDS[kind], **changes))


def model(kind: str = "deformable", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return variant(kind, **changes).build(3)


def pictures(*sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random pictures of the given heights and widths, padded to one size."""
    generator = torch.Generator().manual_seed(0)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width)
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return images, mask


def targets(masks: bool = True) -> list[Target]:
    boxes = torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.6, 0.6, 0.5, 0.3]])
    extras = {"masks": box_masks(boxes, torch.ones(2), (64, 96))} if masks else {}
    return [Target(torch.tensor([0, 2]), boxes, extras), Target(torch.tensor([1]), boxes[:1], {})]


@each_kind
def test_gradients_reach_every_parameter(kind: str) -> None:
    declared, module = variant(kind), model(kind).train()
    output = module(*pictures((64, 96), (64, 64)))
    losses = declared.family.build_criterion(declared.config, 3)(output, targets())
    losses.total.backward()
    idle = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["level_embed"]


@each_kind
def test_terms_are_those_of_what_is_predicted(kind: str) -> None:
    declared, module = variant(kind), model(kind).train()
    config = declared.config
    output = module(*pictures((64, 96), (64, 64)))
    terms = declared.family.build_criterion(config, 3)(output, targets()).terms
    layers = ["_0", ""] + (["_enc"] if config.two_stage else [])
    wanted = ["ce", "bbox", "giou"] + ["center"] * config.centerness + ["iouaware"] * config.iou
    tokens = {"token_focal", "token_dice"} if config.token_labels else set()
    assert set(terms) == {name + layer for name in wanted for layer in layers} | tokens


@each_kind
def test_training_and_evaluation_give_the_same_answers(kind: str) -> None:
    module, batch = model(kind), pictures((64, 96), (64, 64))
    with torch.no_grad():
        training, evaluation = module.train()(*batch), module.eval()(*batch)
    torch.testing.assert_close(training.logits, evaluation.logits)
    torch.testing.assert_close(training.boxes, evaluation.boxes)
    assert evaluation.proposals is None


def test_kept_proposals_change_no_detection() -> None:
    batch = pictures((64, 96), (64, 64))
    with torch.no_grad():
        chosen, kept = (
            model("deformable").eval()(*batch),
            model("deformable", keep_proposals=True).eval()(*batch),
        )
        proposed = model("deformable").train()(*batch).proposals
    torch.testing.assert_close(kept.logits, chosen.logits)
    torch.testing.assert_close(kept.boxes, chosen.boxes)
    torch.testing.assert_close(kept.proposals.boxes, proposed.boxes)


# any backbone


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "swin_s3_tiny_224"])
def test_another_backbone_is_one_override_away(name: str) -> None:
    module = detrcli.create_model("d2etr/tiny", **own_norm(name)).eval()
    with torch.no_grad():
        output = module(*pictures((64, 96), (50, 70)))
    assert output.boxes.shape == (2, 10, 4)
    assert torch.isfinite(output.logits).all()


def test_the_paper_s_model_takes_swin_and_its_own_weights_with_one_override() -> None:
    declared = resolve("d2etr/deformable")
    swin = "swin_tiny_patch4_window7_224"
    config = detrcli.config.assign(declared.config, {"backbone.name": swin})
    assert config.backbone.starts_from == swin
    assert declared.config.backbone.starts_from == "pvt_v2_b2_li.in1k"
    with torch.device("meta"):
        module = declared.configured(config).build(91)
    assert module.fusion.projections[-1].conv.weight.shape == (256, 768, 3, 3)


def own_norm(name: str) -> dict[str, str]:
    """Tiny puts group norms where ResNets have batch norms."""
    return {"backbone.name": name, "backbone.norm": "default"}


def test_a_norm_that_a_backbone_does_not_take_is_told() -> None:
    with pytest.raises(UsageError, match="cannot be built with norm='group'") as caught:
        detrcli.create_model("d2etr/tiny", **{"backbone.name": "test_convnext"})
    assert "model.backbone.norm=default" in str(caught.value.hint)


def test_a_backbone_without_the_maps_asked_for_is_told() -> None:
    with pytest.raises(UsageError, match=r"has maps at levels \[2, 3, 4, 5\], not at \[6\]") as caught:
        detrcli.create_model("d2etr/tiny", **{**own_norm("test_convnext"), "backbone.levels": [3, 6]})
    assert "model.backbone.levels" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pool": 0}, "pool"),
        ({"decoded_maps": 4}, "decoded_maps"),
        ({"heads": 7}, "heads"),
        ({"refine": False}, "two_stage"),
        ({"ceca_residual": "postnorm"}, "ceca_residual"),
        ({"backbone.levels": [4], "coarser_map": False, "decoded_maps": 1}, "at least 2 maps"),
    ],
)
def test_settings_that_cannot_be_are_told_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        detrcli.create_model("d2etr/tiny", **changes)


# fusion


def fuse(masked: bool = False, residual: Any = "official") -> CrossScaleFusion:
    torch.manual_seed(1)
    return CrossScaleFusion(
        (8, 12, 16),
        32,
        coarser=True,
        blocks=2,
        heads=4,
        ffn=64,
        pool=3,
        residual=residual,
        masked=masked,
    ).eval()


def maps_of(height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1, c, height // s, width // s, generator=generator)
        for c, s in ((8, 8), (12, 16), (16, 32))
    ]


def padded(maps: list[Tensor], height: int, width: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The maps in a corner of larger ones full of noise, and the mask of the larger picture."""
    generator = torch.Generator().manual_seed(3)
    small, mask = maps[0].shape, torch.ones(1, height, width, dtype=torch.bool)
    mask[:, : small[2] * 8, : small[3] * 8] = False
    placed = []
    for x, stride in zip(maps, (8, 16, 32), strict=True):
        large = torch.randn(1, x.shape[1], height // stride, width // stride, generator=generator)
        large[:, :, : x.shape[2], : x.shape[3]] = x
        placed.append((large, mask[:, ::stride, ::stride]))
    return placed, mask


@pytest.mark.parametrize("residual", ["official", "prenorm"])
@pytest.mark.parametrize("masked", [False, True])
def test_masked_pooling_keeps_padding_out_and_the_official_way_does_not(masked: bool, residual: Any) -> None:
    module, maps = fuse(masked, residual), maps_of(128, 192)
    empty = torch.zeros(1, 128, 192, dtype=torch.bool)
    with torch.no_grad():
        alone = module(
            [(x, empty[:, :: 128 // x.shape[2], :: 128 // x.shape[2]]) for x in maps], empty, False
        )
        placed, mask = padded(maps, 192, 256)
        beside = module(placed, mask)
    apart = [
        (x - y[:, :, : x.shape[2], : x.shape[3]]).abs().max().item()
        for (x, _), (y, _) in zip(alone, beside, strict=True)
    ]
    assert apart[0] < 1e-5
    assert (max(apart) < 1e-4) == masked


@pytest.mark.parametrize(("count", "length", "parts"), [(13, 13, 7), (5, 9, 3), (2, 8, 7), (1, 4, 1)])
def test_masked_pooling_cuts_as_adaptive_pooling_does(count: int, length: int, parts: int) -> None:
    x = torch.randn(length)
    weights = pooling_weights(torch.tensor([count]), length, parts)[0]
    expected = nn.functional.adaptive_avg_pool1d(x[None, None, :count], parts)[0, 0]
    torch.testing.assert_close(weights @ x, expected)


def test_fused_maps_are_pooled_once_with_the_result_of_pooling_in_every_block(monkeypatch) -> None:
    module, maps = fuse(), maps_of(128, 192)
    empty = torch.zeros(1, 128, 192, dtype=torch.bool)
    given = [(x, empty[:, :: 128 // x.shape[2], :: 128 // x.shape[2]]) for x in maps]
    calls = []
    monkeypatch.setattr(fusion_module, "pool_map", lambda x, *rest: calls.append(x) or pool_map(x, *rest))
    with torch.no_grad():
        cached = module(given, empty, False)
        assert len(calls) == 3 + 3 * 2  # three maps, and each block's own: instead of 2 * (2 + 3 + 4)
        fused = [module.projections[0](maps[0])]
        for stage, project, x in zip(
            module.stages, module.projections[1:], [*maps[1:], maps[-1]], strict=True
        ):
            fused.append(in_every_block(stage, project(x), fused))
    for (x, _), y in zip(cached, fused, strict=True):
        torch.testing.assert_close(x, y)


def in_every_block(stage: FusingStage, x: Tensor, earlier: list[Tensor]) -> Tensor:
    """A stage as the official code orders it: all maps are pooled anew in every block."""
    size = (x.shape[2], x.shape[3])
    tokens = to_tokens(x)
    for block in stage.blocks:
        tokens = block(tokens, size, [pool_map(y, 3, None) for y in earlier])
    return stage.norm(tokens).mT.unflatten(2, size)


def test_a_pool_larger_than_a_map_works_and_is_told_once(caplog) -> None:
    fusion_module._tell_once.cache_clear()
    module = model(pool=7).eval()
    with caplog.at_level(logging.WARNING, logger="detrcli"), torch.no_grad():
        for _ in range(2):
            output = module(*pictures((64, 64)))
    assert torch.isfinite(output.logits).all()
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert "pool (7) is larger than the coarsest fused map (2x2)" in told[0]
    assert "model.pool=2" in told[0]


def test_drop_path_rates_are_those_of_the_official_schedule() -> None:
    assert drop_rates(0.1, stages=3, blocks=3) == pytest.approx([0, 0.0125, 0.025])
    assert drop_rates(0.1, stages=2, blocks=3) == pytest.approx([0, 0.02, 0.04])
    assert drop_rates(0.0, stages=1, blocks=1) == [0.0]


# scores and switches


def test_scores_rank_as_the_paper_s_form_does() -> None:
    torch.manual_seed(0)
    output = Output(
        torch.randn(1, 20, 5),
        torch.rand(1, 20, 4),
        extras={IOU: torch.randn(1, 20), CENTERNESS: torch.randn(1, 20)},
    )
    ours = location_aware_scores(output, 0.45, 0.5, 0.05)
    p, iou, centre = (
        output.logits.sigmoid(),
        output.extras[IOU].sigmoid(),
        output.extras[CENTERNESS].sigmoid(),
    )
    torch.testing.assert_close(ours, p**0.45 * iou[..., None] ** 0.5 * centre[..., None] ** 0.05)
    paper = p * iou[..., None] ** (0.5 / 0.45) * centre[..., None] ** (0.05 / 0.45)
    assert torch.equal(ours.flatten().argsort(), paper.flatten().argsort())


def test_heads_that_are_not_there_do_not_count() -> None:
    output = Output(torch.randn(1, 4, 3), torch.rand(1, 4, 4))
    torch.testing.assert_close(location_aware_scores(output, 1.0, 0.5, 0.05), output.logits.sigmoid())


@pytest.mark.parametrize("masked", [False, True])
def test_padding_is_proposed_unless_forbidden(masked: bool) -> None:
    module = model(mask_proposals=masked).eval()
    queries = module.queries
    with torch.no_grad():  # an objectness that is highest where nothing is
        unusable = queries.embed(torch.zeros(1, 1, 64), torch.ones(1, 1, dtype=torch.bool))
        queries.class_head.weight.copy_(unusable[0].expand(3, -1))
        output = module(*pictures((64, 64), (32, 32)))
    at_infinity = (output.aux[0].extras["reference"] == 1).all(-1)
    assert at_infinity.any().item() is not masked


def test_rates_follow_the_official_code() -> None:
    declared = resolve("d2etr/deformable")
    with torch.device("meta"):
        module = declared.build()
    factors = {
        id(p): group["factor"]
        for group in parameter_groups(module, declared.variant.recipes[0])
        for p in group["params"]
    }
    slow = {name.split(".")[0] for name, p in module.named_parameters() if factors.get(id(p)) == 0.1}
    assert slow == {"backbone", "decoder"}
    assert all(factors[id(p)] == 1 for p in module.fusion.parameters())


# token labels


def test_channels_of_tokens() -> None:
    assert TokenClasses.of(91, "auto") == TokenClasses(91, 0)
    assert TokenClasses.of(3, "auto") == TokenClasses(4, 3)
    assert TokenClasses.of(3, "first") == TokenClasses(3, 0)
    assert TokenClasses.of(91, "last") == TokenClasses(92, 91)


def test_the_first_annotated_object_is_on_top_and_labels_are_shares() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, :, :4], masks[1, :, 2:6] = 1, 1
    target = Target(torch.tensor([2, 0]), torch.rand(2, 4), {"masks": masks})
    (labels,) = token_labels([torch.zeros(1, 4, 2, 2)], [target], torch.ones(1, 2), any_object=3)
    columns = labels[0, :, 0]  # (K, W)
    torch.testing.assert_close(columns[2], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(columns[0], torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(columns[3], torch.tensor([1.0, 0.5]))
    assert columns[1].sum() == 0


def test_without_masks_boxes_are_painted_in_the_unpadded_part_and_that_is_told(caplog) -> None:
    token_module._tell_of_boxes.cache_clear()
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
    with caplog.at_level(logging.WARNING, logger="detrcli"):
        (labels,) = token_labels(
            [torch.zeros(1, 3, 4, 4)], [target], torch.tensor([[0.5, 0.75]]), any_object=2
        )
    assert "no masks" in caplog.text
    expected = torch.zeros(4, 4)
    expected[:3, :2] = 1
    torch.testing.assert_close(labels[0, 1], expected)


@functools.cache
def rectangular() -> tuple[Tensor, Tensor]:
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.5]])
    return boxes, box_masks(boxes, torch.ones(2), (64, 64))


def test_masks_that_are_boxes_give_what_boxes_give() -> None:
    boxes, masks = rectangular()
    maps, extent = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)], torch.ones(1, 2)
    drawn = token_labels(maps, [Target(torch.tensor([1]), boxes)], extent, any_object=2)
    given = token_labels(maps, [Target(torch.tensor([1]), boxes, {"masks": masks})], extent, any_object=2)
    for a, b in zip(drawn, given, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_asks_for_masks_only_when_it_labels_tokens() -> None:
    assert TINY.family.needs(TINY.config) == {"masks"}
    assert TINY.family.needs(replace(TINY.config, token_labels=False)) == frozenset()
    module = model(token_labels=False).train()
    assert EXTENT not in module(*pictures((64, 64))).extras
