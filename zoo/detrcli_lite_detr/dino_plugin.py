"""What DINO declares: the host of Lite-DINO, which table 4 of Lite DETR compares with. Free of torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from detrcli.plugins.backbones import BackboneConfig
from detrcli.plugins.contract import Family, Paper, Part, Plugin, Preprocess, Published, Recipe, Variant
from detrcli_lite_detr.config import DinoConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output
    from detrcli.weights.keymap import KeyMap

PAPER = Paper(
    title="DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
    authors="Zhang, Li, Liu, Zhang, Su, Zhu, Ni, Shum",
    venue="ICLR",
    year=2023,
    url="https://arxiv.org/abs/2203.03605",
    code="https://github.com/IDEA-Research/DINO/tree/faa8520fe9604c23ad65a48bc583550a44c0e3ab",
)
RECIPE = Recipe(
    epochs=36,
    batch_size=16,
    lr=1e-4,
    lr_drop=30,
    lr_factors={r"^backbone\.": 0.1},
    source="configuration of the official code, 36 epochs",
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
PARTS: Mapping[Part, Sequence[str]] = {
    "backbone": ("backbone",),
    "projection": ("levels",),
    "encoder": ("encoder",),
    "decoder": ("queries", "denoising", "decoder"),
    "heads": ("class_head", "box_head"),
}
SWIN_T = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    levels=(3, 4, 5),
    norm="default",
    frozen=(),
    pretrained="swin_tiny_patch4_window7_224.ms_in1k",
    drop_path=0.2,
)
TINY = DinoConfig(
    backbone=BackboneConfig(name="test_resnet", levels=(3, 4), norm="group", frozen=(), pretrained=None),
    levels=3,
    width=64,
    heads=4,
    ffn=128,
    encoder_layers=2,
    decoder_layers=2,
    num_queries=20,
    denoising=4,
    box_noise=0.4,
)
SMALL_PICTURES = Preprocess(short_side=64, long_side=128)


def _build_model(config: DinoConfig, num_classes: int) -> nn.Module:
    from detrcli_deformable_detr.encoder import Encoder
    from detrcli_lite_detr.dino import Dino
    from detrcli_lite_detr.kda import decoder_attention

    encoder = Encoder(
        config.encoder_layers,
        config.width,
        config.heads,
        config.levels,
        config.points,
        config.ffn,
        config.dropout,
    )
    return Dino(config, num_classes, encoder, partial(decoder_attention, False, config))


def build_criterion(config: object, num_classes: int) -> Criterion:
    from detrcli_lite_detr.criterion import DinoCriterion

    return DinoCriterion()


def postprocess(config: DinoConfig, output: Output, sizes: Tensor) -> list[Detections]:
    from detrcli.postprocess import sigmoid_topk

    return sigmoid_topk(output, sizes, config.top)


def _official(config: DinoConfig) -> KeyMap:
    from detrcli_lite_detr.keymap import dino

    return dino(config)


def row(source: str, ap: Sequence[float], gflops: tuple[float, float], difference: str = "") -> Published:
    """A row of a table of 36 epochs: AP, AP50, AP75, small, medium, large; GFLOPs of the model and of its encoder."""
    whole, ap50, ap75, small, medium, large = ap
    return Published(
        source=source,
        epochs=36,
        ap=whole,
        ap50=ap50,
        ap75=ap75,
        ap_small=small,
        ap_medium=medium,
        ap_large=large,
        params_m=47,
        gflops=gflops[0],
        gflops_by_part={"encoder": gflops[1]},
        gflops_at="800x1066",  # not stated; this size fits every row of the table, the hundred pictures none
        difference=difference,
    )


TABLE_4 = "table 4 of Lite DETR (arXiv 2303.07335), 36 epochs"
VARIANTS = (
    Variant(
        name="r50",
        summary="four scales, ResNet-50",
        config=DinoConfig(box_noise=0.4),
        recipes=(RECIPE,),
        params=46_893_182,
        published=row(TABLE_4, (50.7, 68.6, 55.4, 33.5, 54.0, 64.8), (235, 137)),
    ),
    Variant(
        name="swin-t",
        summary="four scales, Swin-T",
        config=DinoConfig(backbone=SWIN_T, box_noise=0.4),
        recipes=(RECIPE,),
        params=47_436_216,
        published=row(TABLE_4, (54.1, 72.0, 59.3, 38.3, 57.3, 68.6), (243, 137)),
    ),
    Variant(
        name="tiny",
        summary="for tests and a first look; ours, not the paper's",
        config=TINY,
        recipes=(TINY_RECIPE,),
        params=439_070,
        num_classes=3,
        preprocess=SMALL_PICTURES,
    ),
)

plugin = Plugin(
    api=1,
    paper=PAPER,
    families=(
        Family(
            name="dino",
            summary="denoising, boxes from proposals, each layer trained by the next one's loss",
            variants=VARIANTS,
            build_model=_build_model,
            build_criterion=build_criterion,
            postprocess=postprocess,
            masked_after="levels",
            parts=PARTS,
            key_maps={"official": _official},
            takes_targets=True,
        ),
    ),
)
