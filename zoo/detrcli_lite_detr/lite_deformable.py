"""The family `lite_deformable`: Deformable DETR around the interleaved encoder (table 3 of the paper). Free of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from detrcli.plugins.backbones import BackboneConfig
from detrcli.plugins.contract import Family, Preprocess, Published, Recipe, Variant
from detrcli_deformable_detr.config import DeformableDetrConfig
from detrcli_lite_detr.config import QUESTION, Interleaving, LiteDeformableConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output
    from detrcli.weights.keymap import KeyMap

# the paper gives none for this host: it is the one of Deformable DETR's two-stage model
RECIPE = Recipe(
    epochs=50,
    batch_size=32,
    lr=2e-4,
    lr_drop=40,
    lr_factors={r"^backbone\.": 0.1, r"sampling_offsets": 0.1},
    source="Deformable DETR, sec. 5 and appendix A.4",
)
TINY_RECIPE = Recipe(
    epochs=4,
    batch_size=16,
    lr=2e-3,
    lr_factors={r"sampling_offsets": 0.1},
    schedule="cosine",
    warmup_steps=50,
    clip_norm=0.5,
    augment="flip",
)


def _build_model(config: LiteDeformableConfig, num_classes: int) -> nn.Module:
    from detrcli_deformable_detr.model import DeformableDetr
    from detrcli_lite_detr.interleaved_encoder import InterleavedEncoder

    return DeformableDetr(config.host, num_classes, InterleavedEncoder(config.encoder, config.host))


def _build_criterion(config: LiteDeformableConfig, num_classes: int) -> Criterion:
    from detrcli_deformable_detr.criterion import DeformableCriterion

    return DeformableCriterion()


def _postprocess(config: LiteDeformableConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import sigmoid_topk

    return sigmoid_topk(output, sizes)


def _official(config: LiteDeformableConfig) -> KeyMap:
    from detrcli_lite_detr.keymap import lite_deformable

    return lite_deformable(config)


def _hub(config: LiteDeformableConfig) -> KeyMap:
    from detrcli_lite_detr.keymap import lite_deformable_hub

    return lite_deformable_hub(config)


def _row(
    name: str,
    choice: Interleaving,
    params: int,
    ap: tuple[float, ...],
    gflops: tuple[float, float],
    difference: str,
) -> Variant[LiteDeformableConfig]:
    """A row of table 3: AP, AP50, AP75, small, medium, large; GFLOPs of the model and of its encoder."""
    whole, ap50, ap75, small, medium, large = ap
    return Variant(
        name=name,
        summary=f"{choice.high_levels} high levels, {choice.blocks} update{'s' * (choice.blocks > 1)} of the low",
        config=LiteDeformableConfig(encoder=choice),
        recipes=(RECIPE,),
        params=params,
        published=Published(
            source="table 3, 50 epochs",
            epochs=50,
            ap=whole,
            ap50=ap50,
            ap75=ap75,
            ap_small=small,
            ap_medium=medium,
            ap_large=large,
            params_m=41,
            gflops=gflops[0],
            gflops_by_part={"encoder": gflops[1]},
            gflops_at="800x1066",  # not stated; three of the four rows fit this size
            difference=difference,
        ),
    )


NO_SAMPLING = "the encoder's number fits a count without bilinear sampling, which is counted here"
H3L1 = Interleaving(high_levels=3, blocks=3)
TINY_HOST = DeformableDetrConfig(
    backbone=BackboneConfig(name="test_resnet", levels=(3, 4), norm="group", frozen=(), pretrained=None),
    levels=3,
    width=64,
    heads=4,
    ffn=128,
    encoder_layers=2,
    decoder_layers=2,
    num_queries=10,
    dropout=0.0,
    refine=True,
    two_stage=True,
    proposal_channels=1,
)
VARIANTS = (
    _row("h3l1-2x3", H3L1, 41_775_193, (46.7, 66.1, 50.6, 29.1, 49.7, 62.2), (123, 39), NO_SAMPLING),
    _row(
        "h3l1-3x2",
        replace(H3L1, blocks=2),
        41_643_097,
        (46.2, 65.5, 49.8, 28.2, 49.2, 61.5),
        (119, 35),
        NO_SAMPLING,
    ),
    _row(
        "h3l1-6x1",
        replace(H3L1, blocks=1),
        41_511_001,
        (45.9, 65.6, 49.2, 27.9, 49.0, 61.6),
        (115, 30),
        NO_SAMPLING,
    ),
    _row(
        "h2l2-2x3",
        replace(H3L1, high_levels=2),
        41_775_193,
        (45.8, 65.1, 49.3, 27.7, 49.1, 61.1),
        (108, 23),
        "the encoder counts 6 GFLOPs more and the rest agrees; the reason is not known, for the configuration is not released",
    ),
    Variant(
        name="tiny",
        summary="for tests and a first look; ours, not the paper's",
        config=LiteDeformableConfig(
            host=TINY_HOST, encoder=Interleaving(high_levels=2, blocks=1, low_ffn=64)
        ),
        recipes=(TINY_RECIPE,),
        params=460_931,
        num_classes=3,
        preprocess=Preprocess(short_side=64, long_side=128),
    ),
)

FAMILY = Family(
    name="lite_deformable",
    summary="Deformable DETR whose encoder rarely updates the tokens of its finest levels",
    variants=VARIANTS,
    build_model=_build_model,
    build_criterion=_build_criterion,
    postprocess=_postprocess,
    masked_after="levels",
    parts={
        "backbone": ("backbone",),
        "projection": ("levels",),
        "encoder": ("encoder",),
        "decoder": ("queries", "decoder"),
        "heads": ("class_heads", "box_heads"),
    },
    key_maps={"official": _official, "hub": _hub},
    donors={"deformable_detr": r"encoder\.layers\.\d+\.(self_attn|low)\."},
    question=QUESTION,
)
