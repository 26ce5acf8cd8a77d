"""What DETR declares: its table of models, its recipe, its weights. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrcli.plugins.backbones import BackboneConfig
from detrcli.plugins.contract import Family, Paper, Plugin, Preprocess, Published, Recipe, Variant, Weights
from detrcli_detr.config import DetrConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output
    from detrcli.weights.keymap import KeyMap

PAPER = Paper(
    title="End-to-End Object Detection with Transformers",
    authors="Carion, Massa, Synnaeve, Usunier, Kirillov, Zagoruyko",
    venue="ECCV",
    year=2020,
    url="https://arxiv.org/abs/2005.12872",
    code="https://github.com/facebookresearch/detr/tree/29901c51d7fe8712168b8d0d64351170bc0f83e0",
)

# 500 epochs on 32 (DC5: 64) GPUs; the paper's ablations and its README use the shorter one.
LONG = Recipe(
    epochs=500,
    batch_size=64,
    lr_drop=400,
    lr_factors={r"^backbone\.": 0.1},
    source="sec. 4, 500-epoch schedule",
)
SHORT = Recipe(
    epochs=300,
    batch_size=64,
    lr_drop=200,
    lr_factors={r"^backbone\.": 0.1},
    source="sec. 4, 300-epoch schedule",
)
TINY = Recipe(
    epochs=40, batch_size=16, lr=1e-3, schedule="cosine", warmup_steps=50, clip_norm=0.5, augment="flip"
)


def _weights(repo: str) -> tuple[Weights, ...]:
    return (
        Weights(
            repo=repo,
            filename="model.safetensors",
            license="apache-2.0",
            layout="hub",
            note="revision and hash could not be looked up; the first download is recorded",
        ),
    )


def _build_model(config: DetrConfig, num_classes: int) -> nn.Module:
    from detrcli_detr.model import Detr

    return Detr(config, num_classes)


def _build_criterion(config: DetrConfig, num_classes: int) -> Criterion:
    from detrcli.nn.criterion import SetCriterion

    return SetCriterion(kind="softmax", class_cost=1, class_weight=1, no_object=config.no_object)


def _postprocess(config: DetrConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import softmax_best

    return softmax_best(output, sizes)


def _official(config: DetrConfig) -> KeyMap:
    from detrcli_detr.keymap import OFFICIAL

    return OFFICIAL


def _hub(config: DetrConfig) -> KeyMap:
    from detrcli_detr.keymap import HUB

    return HUB


def _variant(
    name: str, backbone: str, *, dilated: bool, params: int, published: Published
) -> Variant[DetrConfig]:
    network = BackboneConfig(name=backbone, dilated=dilated, pretrained=f"{backbone}.tv_in1k")
    return Variant(
        name=name,
        config=DetrConfig(backbone=network),
        recipes=(LONG, SHORT),
        params=params,
        published=published,
        weights=_weights(f"facebook/detr-{backbone.replace('resnet', 'resnet-')}{'-dc5' if dilated else ''}"),
    )


VARIANTS = (
    _variant(
        "r50",
        "resnet50",
        dilated=False,
        params=41_524_768,
        published=Published(
            source="table 1, 500 epochs",
            epochs=500,
            ap=42.0,
            ap50=62.4,
            ap75=44.2,
            ap_small=20.5,
            ap_medium=45.8,
            ap_large=61.1,
            params_m=41,
            gflops=86,
        ),
    ),
    _variant(
        "r50-dc5",
        "resnet50",
        dilated=True,
        params=41_524_768,
        published=Published(
            source="table 1, 500 epochs",
            epochs=500,
            ap=43.3,
            ap50=63.1,
            ap75=45.9,
            ap_small=22.5,
            ap_medium=47.3,
            ap_large=61.1,
            params_m=41,
            gflops=187,
            difference="the original counter adds the softmax of attention: 184.1 with it",
        ),
    ),
    _variant(
        "r101",
        "resnet101",
        dilated=False,
        params=60_464_672,
        published=Published(
            source="table 1, 500 epochs",
            epochs=500,
            ap=43.5,
            ap50=63.8,
            ap75=46.4,
            ap_small=21.9,
            ap_medium=48.0,
            ap_large=61.8,
            params_m=60,
            gflops=152,
        ),
    ),
    _variant(
        "r101-dc5",
        "resnet101",
        dilated=True,
        params=60_464_672,
        published=Published(
            source="table 1, 500 epochs",
            epochs=500,
            ap=44.9,
            ap50=64.7,
            ap75=47.7,
            ap_small=23.7,
            ap_medium=49.5,
            ap_large=62.3,
            params_m=60,
            gflops=253,
        ),
    ),
    Variant(
        name="tiny",
        summary="for tests and a first look; ours, not the paper's",
        config=DetrConfig(
            backbone=BackboneConfig(
                name="test_resnet", levels=(3,), norm="group", frozen=(), pretrained=None
            ),
            width=64,
            heads=4,
            ffn=128,
            encoder_layers=1,
            decoder_layers=2,
            num_queries=10,
            dropout=0.0,
        ),
        recipes=(TINY,),
        params=209_112,
        num_classes=3,
        preprocess=Preprocess(short_side=64, long_side=128),
    ),
)

plugin = Plugin(
    api=1,
    paper=PAPER,
    families=(
        Family(
            name="detr",
            summary="set prediction with a transformer and learned queries",
            variants=VARIANTS,
            build_model=_build_model,
            build_criterion=_build_criterion,
            postprocess=_postprocess,
            masked_after="backbone",
            parts={
                "backbone": ("backbone",),
                "projection": ("input_proj",),
                "encoder": ("encoder",),
                "decoder": ("query_embed", "decoder"),
                "heads": ("class_head", "box_head"),
            },
            key_maps={"official": _official, "hub": _hub},
            eval_batch_size=lambda config: (
                1 if config.backbone.dilated else None
            ),  # DC5 models never saw padding
        ),
    ),
)
