"""What Anchor DETR declares. Nothing heavy is imported at the top of this file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrcli.plugins.backbones import BackboneConfig
from detrcli.plugins.contract import Family, Paper, Plugin, Preprocess, Recipe, Variant
from detrcli_anchor_detr.config import AnchorDetrConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output


def _build_model(config: AnchorDetrConfig, num_classes: int) -> nn.Module:
    from detrcli_anchor_detr.model import AnchorDetr

    return AnchorDetr(config, num_classes)


def _build_criterion(config: AnchorDetrConfig, num_classes: int) -> Criterion:
    from detrcli.nn.criterion import SetCriterion

    return SetCriterion(kind="focal", class_cost=2, class_weight=2)


def _postprocess(config: AnchorDetrConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import sigmoid_topk

    return sigmoid_topk(output, sizes)


BASE = Variant(
    name="r50",
    config=AnchorDetrConfig(),
    recipes=(
        Recipe(
            epochs=50,
            batch_size=8,
            lr_drop=40,
            lr_factors={r"^backbone\.": 0.1},
            source="sec. 4.1 of the paper",
        ),
    ),
    params=35_328_631,  # counted; the tests count them again
)
TINY = Variant(
    name="tiny",
    summary="for tests and a first look; ours, not the paper's",
    config=AnchorDetrConfig(
        backbone=BackboneConfig(name="test_resnet", levels=(3,), norm="group", frozen=(), pretrained=None),
        width=64,
        heads=4,
        ffn=128,
        encoder_layers=1,
        decoder_layers=2,
        anchors=25,
        patterns=1,
    ),
    recipes=(Recipe(epochs=8, batch_size=16, lr=1e-3, schedule="cosine", warmup_steps=50, augment="flip"),),
    params=216_969,
    num_classes=3,
    preprocess=Preprocess(short_side=64, long_side=128),
)

plugin = Plugin(
    api=1,
    paper=Paper(
        title="Anchor DETR: Query Design for Transformer-Based Object Detection",
        authors="Wang, Zhang, Yang, Sun",
        venue="AAAI",
        year=2022,
        url="https://arxiv.org/abs/2109.07107",
        code="https://github.com/megvii-research/AnchorDETR",
    ),
    families=(
        Family(
            name="anchor_detr",
            summary="queries that are points in the picture",
            variants=(BASE, TINY),
            build_model=_build_model,
            build_criterion=_build_criterion,
            postprocess=_postprocess,
            masked_after="input_proj",
            parts={
                "backbone": ("backbone",),
                "projection": ("input_proj",),
                "encoder": ("encoder",),
                "decoder": ("anchors", "patterns", "anchor_mlp", "decoder", "norm"),
                "heads": ("class_head", "box_head"),
            },
        ),
    ),
)
