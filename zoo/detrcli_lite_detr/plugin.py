"""What Lite DETR declares: its tables of models, their recipes. Free of torch."""

from __future__ import annotations

from detrcli.plugins.contract import Paper, Plugin
from detrcli_lite_detr.lite_deformable import FAMILY as LITE_DEFORMABLE
from detrcli_lite_detr.lite_dino import FAMILY as LITE_DINO

PAPER = Paper(
    title="Lite DETR: An Interleaved Multi-Scale Encoder for Efficient DETR",
    authors="Li, Zeng, Liu, Zhang, Li, Zhang, Ni",
    venue="CVPR",
    year=2023,
    url="https://arxiv.org/abs/2303.07335",
    code="https://github.com/IDEA-Research/Lite-DETR/tree/6392353c",
)

plugin = Plugin(api=1, paper=PAPER, families=(LITE_DEFORMABLE, LITE_DINO))
