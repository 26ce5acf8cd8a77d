"""What Dynamic DETR declares: its table of models and its recipes. Free of torch. No weights exist: none were released."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from detrcli.plugins.backbones import BackboneConfig
from detrcli.plugins.contract import Family, Paper, Plugin, Preprocess, Published, Recipe, Variant
from detrcli_dynamic_detr.config import DynamicDetrConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output

PAPER = Paper(
    title="Dynamic DETR: End-to-End Object Detection With Dynamic Attention",
    authors="Dai, Chen, Yang, Zhang, Yuan, Zhang",
    venue="ICCV",
    year=2021,
    url="https://openaccess.thecvf.com/content/ICCV2021/html/Dai_Dynamic_DETR_End-to-End_Object_Detection_With_Dynamic_Attention_ICCV_2021_paper.html",
)

# AdamW at 1e-4 and the lengths are the paper's; batch, warm-up, clipping and the backbone's rate are ours. The drops of 1x and
# 3x are Detectron's, scaled from 60k and 80k of 90k iterations (DyHead) and 210k and 250k of 270k (Sparse R-CNN).
ONE = Recipe(
    epochs=12,
    batch_size=16,
    lr_drop=(8, 11),
    lr_factors={r"^backbone\.": 0.1},
    warmup_steps=1000,
    augment="flip",
    source="1x: 12 epochs",
)
THREE = replace(ONE, epochs=36, lr_drop=(28, 33), augment="detr", source="3x: 36 epochs")
LONG = replace(THREE, epochs=50, lr_drop=(40,), source="50 epochs, the long comparison")
TINY = Recipe(
    epochs=4, batch_size=16, lr=5e-4, schedule="cosine", warmup_steps=50, clip_norm=0.5, augment="flip"
)

LITERAL = DynamicDetrConfig(backbone=BackboneConfig(levels=(3, 4, 5)))
SPARSE = replace(LITERAL, dynamic_filters=2, filter_width=64, ffn=2048, class_layers=1, box_layers=3)
SMALL = DynamicDetrConfig(
    backbone=BackboneConfig(name="test_resnet", levels=(3, 4), norm="group", frozen=(), pretrained=None),
    width=64,
    extra_levels=1,
    encoder_layers=1,
    norm_groups=8,
    decoder_layers=2,
    num_queries=10,
    canonical_size=32,
    filter_width=16,
    ffn=128,
)


def _build_model(config: DynamicDetrConfig, num_classes: int) -> nn.Module:
    from detrcli_dynamic_detr.model import DynamicDetr

    return DynamicDetr(config, num_classes)


def _build_criterion(config: DynamicDetrConfig, num_classes: int) -> Criterion:
    from detrcli.nn.criterion import SetCriterion

    return SetCriterion(
        kind=config.class_loss,
        class_cost=config.class_weight,
        class_weight=config.class_weight,
        box_weight=config.box_weight,
        giou_weight=config.giou_weight,
    )


def _postprocess(config: DynamicDetrConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import sigmoid_topk, softmax_best

    return softmax_best(output, sizes) if config.class_loss == "softmax" else sigmoid_topk(output, sizes)


VARIANTS = (
    Variant(
        name="r50",
        summary="one dynamic filter a query, the formulas read literally; the published size",
        config=LITERAL,
        recipes=(ONE, THREE, LONG),
        params=58_838_866,
        published=Published(
            source="DINO (Zhang et al., ICLR 2023), table 1, 12 epochs",
            epochs=12,
            ap=42.9,
            ap50=61.0,
            ap75=46.3,
            ap_small=24.6,
            ap_medium=44.9,
            ap_large=54.4,
            params_m=58,
        ),
    ),
    Variant(
        name="r50-sparse",
        summary="the head of Sparse R-CNN, proven in training there; twice the published size",
        config=SPARSE,
        recipes=(ONE, THREE, LONG),
        params=118_334_674,
    ),
    Variant(
        name="tiny",
        summary="for tests and a first look; ours, not the paper's",
        config=SMALL,
        recipes=(TINY,),
        params=666_034,
        num_classes=3,
        preprocess=Preprocess(short_side=64, long_side=128),
    ),
)

plugin = Plugin(
    api=1,
    paper=PAPER,
    families=(
        Family(
            name="dynamic_detr",
            summary="deformable convolutions across a pyramid, and boxes seen through filters that queries make",
            variants=VARIANTS,
            build_model=_build_model,
            build_criterion=_build_criterion,
            postprocess=_postprocess,
            reads_padding="the encoder convolves, and convolutions see across the edge of the padding",
            parts={
                "backbone": ("backbone",),
                "projection": ("fpn",),
                "encoder": ("encoder",),
                "decoder": ("query_embed", "box_embed", "decoder"),
                "heads": ("class_heads", "box_heads"),
            },
        ),
    ),
)
