"""The choices of Dynamic DETR. The authors never released code, so each one names its ground: the paper, a work it builds on, or ours.

paper           Dynamic DETR, as its abstract and the summaries of later papers report it
DyHead          Dynamic Head (CVPR 2021, same authors), microsoft/DynamicHead at 26d4e66
Sparse R-CNN    (CVPR 2021) PeizeSun/SparseR-CNN at 533e94d
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from detrcli.config import at_least
from detrcli.plugins.backbones import BackboneConfig

NeighbourOrder = Literal["upsample_first", "resize_offsets"]
Operators = Literal["auto", "operator", "grid_sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicDetrConfig:
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(levels=(3, 4, 5)))
    """C3 to C5 (paper: ResNet with FPN); batch norm frozen and the stem fixed: ours, as DETR."""
    width: int = 256
    """Channels of the pyramid and of the queries (paper)."""
    extra_levels: int = 2
    """Levels made from the last lateral by strided convolutions, P6 and P7. Five scales: paper; made from P5: DyHead."""

    encoder_layers: int = 6
    """Paper."""
    neighbour_order: NeighbourOrder = "upsample_first"
    """How the coarser neighbour meets the offsets of a level: ours. DyHead's code reads them from the wrong places; the
    formula asks for `upsample_first`. `resize_offsets` convolves at the coarser size, which is cheaper."""
    offset_init: Literal["zero", "default"] = "zero"
    """`zero` starts from plain convolutions: ours; `default` is torch's: DyHead."""
    norm_groups: int = 16
    """Groups of the norm after each deformable convolution: DyHead."""
    dyrelu_reduction: int = 4
    """Width of DyReLU's hidden layer, as a divisor: DyHead."""
    operators: Operators = "auto"
    """What computes deformable convolution and RoIAlign; the answers are the same. `auto`: torchvision's operators, on a CPU a
    faster form of them; `grid_sample` is for exports to runtimes without DeformConv."""

    decoder_layers: int = 6
    """Paper. Boxes start as whole pictures: few layers cost much (29.1 AP with two, as DINO quotes the paper)."""
    num_queries: int = 300
    """Paper."""
    heads: int = 4
    """Of the self-attention (paper); residual and norm around it: Sparse R-CNN."""
    start_box: tuple[float, float, float, float] = (0.5, 0.5, 1.0, 1.0)
    """Where the learned box encodings begin, cxcywh: Sparse R-CNN."""
    pool_size: int = 7
    """Bins of RoIAlign along a side (aligned): Sparse R-CNN."""
    pool_samples: int = 2
    """Samples along a side of a bin: Sparse R-CNN."""
    canonical_size: float = 224.0
    """Boxes of this size (root of the area, pixels) are pooled from `canonical_level`, twice as large ones a level above:
    ours; the rule is FPN's."""
    canonical_level: int = 4
    """See `canonical_size`."""
    dynamic_filters: int = 1
    """1x1 filters made from each query, 1 or 2. One is the paper's formula read literally; two: Sparse R-CNN."""
    filter_width: int = 32
    """Channels after the first filter: ours, chosen to reach the published 58 million parameters (Sparse R-CNN: 64)."""
    ffn: int = 1024
    """Hidden width after the filters: ours, as above (Sparse R-CNN: 2048)."""
    class_layers: int = 0
    """Hidden layers before the class prediction: paper's formula; Sparse R-CNN: 1."""
    box_layers: int = 0
    """Hidden layers before the box prediction: paper's formula; Sparse R-CNN: 3."""
    box_init: Literal["zero", "xavier"] = "zero"
    """Of the last layer that predicts deltas. `zero` leaves boxes where they are at first: ours, as Deformable DETR;
    `xavier` throws them about by their own size: Sparse R-CNN."""
    delta_weights: tuple[float, float, float, float] = (2.0, 2.0, 1.0, 1.0)
    """Divisors of the predicted (dx, dy, dw, dh): Sparse R-CNN. The paper's ReLU(LN(FC)) cannot express free boxes."""

    class_loss: Literal["focal", "softmax"] = "focal"
    """`focal`: ours, as Deformable DETR and Sparse R-CNN; `softmax` with "no object": the paper's formula."""
    class_weight: float = 2.0
    """Of the class in matching and loss: ours, as Deformable DETR and Sparse R-CNN."""
    box_weight: float = 5.0
    """Of L1 in matching and loss: ours, as above."""
    giou_weight: float = 2.0
    """Of GIoU in matching and loss: ours, as above."""

    def __post_init__(self) -> None:
        at_least(0, self, "extra_levels", "encoder_layers", "class_layers", "box_layers")
        at_least(0, self, "class_weight", "box_weight", "giou_weight")
        at_least(1, self, "width", "norm_groups", "dyrelu_reduction", "heads", "ffn")
        at_least(1, self, "decoder_layers", "num_queries", "pool_size", "pool_samples", "filter_width")
        levels = self.backbone.levels
        if self.backbone.dilated or levels != tuple(range(levels[0], levels[0] + len(levels))):
            raise ValueError(
                f"the pyramid needs backbone levels that halve one after another, not {levels}"
                f"{' with a dilated last stage' if self.backbone.dilated else ''}"
            )
        for name, divisor in (("heads", self.heads), ("norm_groups", self.norm_groups)):
            if self.width % divisor:
                raise ValueError(f"width ({self.width}) must be a multiple of {name} ({divisor})")
        if self.dynamic_filters not in (1, 2):
            raise ValueError(f"dynamic_filters is 1 or 2, not {self.dynamic_filters}")

    @property
    def levels(self) -> tuple[int, ...]:
        """The pyramid's levels, finest first; level l has stride 2**l."""
        first = self.backbone.levels[0]
        return tuple(range(first, first + len(self.backbone.levels) + self.extra_levels))
