"""What D²ETR declares: its table of models, its recipe. Free of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from detrcli.plugins.contract import Family, Paper, Plugin, Preprocess, Published, Recipe, Variant
from detrcli_d2etr.config import D2etrConfig, pvt_v2_linear
from detrcli_d2etr.keymap import LAYOUTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output

PAPER = Paper(
    title="D²ETR: Decoder-Only DETR with Computationally Efficient Cross-Scale Attention",
    authors="Lin, Mao, Chen, Xu, He, Xue",
    venue="arXiv",
    year=2022,
    url="https://arxiv.org/abs/2203.00860",
    code="https://github.com/alibaba/easyrobust/tree/bbf8a3dd934c101ba22fb536848f154bdf39dc23/ddetr",
)

LR_FACTORS = {r"^backbone\.": 0.1, r"reference_points|sampling_offsets": 0.1}
PAPER_RECIPE = Recipe(
    epochs=50,
    batch_size=8,
    lr=2e-4,
    lr_drop=40,
    lr_factors=LR_FACTORS,
    source="scripts of the official code",
)
DENSE_RECIPE = replace(PAPER_RECIPE, lr_factors={r"^backbone\.": 0.1, r"reference_points": 0.1})
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


def _build_model(config: D2etrConfig, num_classes: int) -> nn.Module:
    from detrcli_d2etr.model import D2etr

    return D2etr(config, num_classes)


def _build_criterion(config: D2etrConfig, num_classes: int) -> Criterion:
    from detrcli_d2etr.criterion import D2etrCriterion
    from detrcli_d2etr.location_aware import LocationAwareLoss
    from detrcli_d2etr.token_labels import TokenClasses, TokenLabelLoss

    return D2etrCriterion(
        location=LocationAwareLoss(
            detach_iou_target=config.detach_iou_target,
            centerness_of_box=config.centerness_of == "box",
        ),
        tokens=TokenLabelLoss(any_object=TokenClasses.of(num_classes, config.object_channel).any_object),
        weights={
            "center": config.centerness_weight,
            "iouaware": config.iou_weight,
            "token_focal": config.token_focal_weight,
            "token_dice": config.token_dice_weight,
        },
    )


def _postprocess(config: D2etrConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import best_pairs
    from detrcli_d2etr.location_aware import location_aware_scores

    scores = location_aware_scores(output, config.class_power, config.alpha, config.beta)
    return best_pairs(scores, output.boxes, sizes)


VARIANTS = (
    Variant(
        name="deformable",
        summary="four fused maps, deformable decoder, refinement, two stages",
        config=D2etrConfig(),
        recipes=(PAPER_RECIPE,),
        params=41_876_162,
        published=Published(
            source="README of the official code, 50 epochs",
            epochs=50,
            ap=50.0,
            ap50=67.9,
            ap_small=31.7,
            ap_medium=53.4,
            ap_large=66.7,
            params_m=40,
            gflops=93,
            gflops_also=("norms",),
            gflops_set={"keep_proposals": True},
            difference="40 M fit what prediction needs; training has 1.7 M more",
        ),
    ),
    Variant(
        name="vanilla",
        summary="three fused maps, of which a dense decoder reads the coarsest",
        config=D2etrConfig(
            coarser_map=False,
            decoder="dense",
            decoded_maps=1,
            refine=False,
            two_stage=False,
            centerness=False,
            class_power=1.0,
            alpha=1.0,
            beta=0.0,
        ),
        recipes=(DENSE_RECIPE,),
        params=34_936_701,
        published=Published(
            source="README of the official code, 50 epochs",
            epochs=50,
            ap=43.2,
            ap50=62.9,
            ap75=46.2,
            ap_small=22.0,
            ap_medium=48.5,
            ap_large=62.4,
            params_m=35,
            gflops=82,
            gflops_also=("norms",),
        ),
    ),
    Variant(
        name="tiny",
        summary="about half a million parameters, for tests and a first look; ours, not the paper's",
        config=D2etrConfig(
            backbone=replace(
                pvt_v2_linear(),
                name="test_resnet",
                levels=(3, 4),
                norm="group",
                drop_path=0.0,
                pretrained=None,
            ),
            width=64,
            heads=4,
            dropout=0.0,
            fuse_blocks=1,
            fuse_ffn=128,
            fuse_drop_path=0.0,
            pool=2,
            decoded_maps=3,
            decoder_layers=2,
            ffn=128,
            num_queries=10,
        ),
        recipes=(TINY_RECIPE,),
        params=523_279,
        num_classes=3,
        preprocess=Preprocess(short_side=64, long_side=128),
    ),
)

plugin = Plugin(
    api=1,
    paper=PAPER,
    families=(
        Family(
            name="d2etr",
            summary="decoder only: cross-scale attention between the backbone's maps replaces the encoder",
            variants=VARIANTS,
            build_model=_build_model,
            build_criterion=_build_criterion,
            postprocess=_postprocess,
            reads_padding="keys are pooled over whole maps, as the authors do; model.masked_pooling=true leaves padding out",
            parts={
                "backbone": ("backbone",),
                "projection": ("fusion.projections",),
                "encoder": ("fusion.stages",),  # what the others' encoder does
                "decoder": ("level_embed", "queries", "decoder"),
                "heads": (
                    "class_heads",
                    "box_heads",
                    "location_heads",
                    "proposal_heads",
                    "token_embedding",
                    "token_head",
                ),
            },
            key_maps=LAYOUTS,
            needs=lambda config: frozenset({"masks"} if config.token_labels else ()),
        ),
    ),
)
