"""What Deformable DETR declares: its table of models, its recipe, its weights. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrcli.plugins.backbones import BackboneConfig
from detrcli.plugins.contract import Family, Paper, Plugin, Preprocess, Published, Recipe, Variant, Weights
from detrcli_deformable_detr.config import DeformableDetrConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output
    from detrcli.weights.keymap import KeyMap

PAPER = Paper(
    title="Deformable DETR: Deformable Transformers for End-to-End Object Detection",
    authors="Zhu, Su, Lu, Li, Wang, Dai",
    venue="ICLR",
    year=2021,
    url="https://arxiv.org/abs/2010.04159",
    code="https://github.com/fundamentalvision/Deformable-DETR/tree/11169a60c33333af00a4849f1808023eba96a931",
)
README = "README of the official code, 50 epochs"

LR_FACTORS = {r"^backbone\.": 0.1, r"reference_points|sampling_offsets": 0.1}
PAPER_RECIPE = Recipe(
    epochs=50, batch_size=32, lr=2e-4, lr_drop=40, lr_factors=LR_FACTORS, source="sec. 5 and appendix A.4"
)
TINY_RECIPE = Recipe(
    epochs=4,
    batch_size=16,
    lr=1e-3,
    lr_factors={r"reference_points|sampling_offsets": 0.1},
    schedule="cosine",
    warmup_steps=50,
    clip_norm=0.5,
    augment="flip",
)


def _build_model(config: DeformableDetrConfig, num_classes: int) -> nn.Module:
    from detrcli_deformable_detr.model import DeformableDetr

    return DeformableDetr(config, num_classes)


def _build_criterion(config: DeformableDetrConfig, num_classes: int) -> Criterion:
    from detrcli_deformable_detr.criterion import DeformableCriterion

    return DeformableCriterion()


def _postprocess(config: DeformableDetrConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import sigmoid_topk

    return sigmoid_topk(output, sizes)


def _official(config: DeformableDetrConfig) -> KeyMap:
    from detrcli_deformable_detr.keymap import official

    return official(config)


def _hub(config: DeformableDetrConfig) -> KeyMap:
    from detrcli_deformable_detr.keymap import hub

    return hub(config)


def _released(repo: str) -> tuple[Weights, ...]:
    return (
        Weights(
            repo=f"SenseTime/{repo}",
            filename="model.safetensors",
            license="apache-2.0",
            layout="hub",
            note="revision and hash could not be looked up; the first download is recorded",
        ),
    )


def _single_scale(*, dilated: bool) -> DeformableDetrConfig:
    return DeformableDetrConfig(backbone=BackboneConfig(levels=(5,), dilated=dilated), levels=1)


VARIANTS = (
    Variant(
        name="r50-two-stage",
        summary="refinement and two stages: the paper's best",
        config=DeformableDetrConfig(refine=True, two_stage=True),
        recipes=(PAPER_RECIPE,),
        params=41_181_529,
        published=Published(
            source=README,
            epochs=50,
            ap=46.9,
            ap_small=29.6,
            ap_medium=50.1,
            ap_large=61.6,
            params_m=41,
            gflops=173,
        ),
        weights=_released("deformable-detr-with-box-refine-two-stage"),
    ),
    Variant(
        name="r50-refine",
        summary="iterative bounding box refinement",
        config=DeformableDetrConfig(refine=True),
        recipes=(PAPER_RECIPE,),
        params=40_849_660,
        published=Published(
            source=README,
            epochs=50,
            ap=46.2,
            ap_small=28.3,
            ap_medium=49.2,
            ap_large=61.5,
            params_m=41,
            gflops=173,
        ),
        weights=_released("deformable-detr-with-box-refine"),
    ),
    Variant(
        name="r50",
        summary="four feature levels",
        config=DeformableDetrConfig(),
        recipes=(PAPER_RECIPE,),
        params=40_069_665,
        published=Published(
            source=README,
            epochs=50,
            ap=44.5,
            ap_small=27.1,
            ap_medium=47.6,
            ap_large=59.6,
            params_m=40,
            gflops=173,
        ),
        weights=_released("deformable-detr"),
    ),
    Variant(
        name="r50-single-scale",
        summary="one feature level, stride 32",
        config=_single_scale(dilated=False),
        recipes=(PAPER_RECIPE,),
        params=34_066_593,
        published=Published(
            source=README,
            epochs=50,
            ap=39.4,
            ap_small=20.6,
            ap_medium=43.0,
            ap_large=55.5,
            params_m=34,
            gflops=78,
        ),
        weights=_released("deformable-detr-single-scale"),
    ),
    Variant(
        name="r50-single-scale-dc5",
        summary="one feature level, stride 16",
        config=_single_scale(dilated=True),
        recipes=(PAPER_RECIPE,),
        params=34_066_593,
        published=Published(
            source=README,
            epochs=50,
            ap=41.5,
            ap_small=24.1,
            ap_medium=45.3,
            ap_large=56.0,
            params_m=34,
            gflops=128,
        ),
        weights=_released("deformable-detr-single-scale-dc5"),
    ),
    Variant(
        name="pvt2",
        summary="four levels of PVTv2-B2-Linear: the baseline of the D²ETR paper",
        config=DeformableDetrConfig(
            backbone=BackboneConfig(
                name="pvt_v2_b2_li",
                levels=(3, 4, 5),
                norm="default",
                frozen=(),
                pretrained="pvt_v2_b2_li.in1k",
            )
        ),
        recipes=(PAPER_RECIPE,),
        params=34_444_577,
        published=Published(
            source="table of D²ETR (arXiv 2203.00860), 50 epochs",
            epochs=50,
            ap=48.3,
            ap_small=30.5,
            ap_medium=51.6,
            ap_large=63.8,
            gflops=163,
        ),
    ),
    Variant(
        name="tiny",
        summary="for tests and a first look; ours, not the paper's",
        config=DeformableDetrConfig(
            backbone=BackboneConfig(
                name="test_resnet", levels=(3, 4), norm="group", frozen=(), pretrained=None
            ),
            levels=2,
            width=64,
            heads=4,
            ffn=128,
            encoder_layers=1,
            decoder_layers=2,
            num_queries=10,
            dropout=0.0,
            refine=True,
            two_stage=True,
            proposal_channels=1,
        ),
        recipes=(TINY_RECIPE,),
        params=295_683,
        num_classes=3,
        preprocess=Preprocess(short_side=64, long_side=128),
    ),
)

plugin = Plugin(
    api=1,
    paper=PAPER,
    families=(
        Family(
            name="deformable_detr",
            summary="attention to a few sampled points in several feature levels",
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
            eval_batch_size=lambda config: 1 if config.backbone.dilated else None,
        ),
    ),
)
