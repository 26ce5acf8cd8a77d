"""The choices of D²ETR. Where the authors' code departs from what one would write, a field says so and keeps their way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from detrcli.config import at_least, probabilities
from detrcli.plugins.backbones import BackboneConfig


def pvt_v2_linear() -> BackboneConfig:
    return BackboneConfig(
        name="pvt_v2_b2_li",
        levels=(3, 4, 5),
        norm="default",
        frozen=(),
        drop_path=0.1,
        pretrained="pvt_v2_b2_li.in1k",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class D2etrConfig:
    backbone: BackboneConfig = field(default_factory=pvt_v2_linear)
    width: int = 256
    heads: int = 8
    dropout: float = 0.1

    # cross-scale attention between the backbone's maps
    coarser_map: bool = True
    """One more map, of half the backbone's last."""
    fuse_blocks: int = 3
    """CECA blocks of each map but the finest."""
    fuse_ffn: int = 1024
    """Hidden width of a CECA block."""
    fuse_drop_path: float = 0.1
    """Stochastic depth of the last of all CECA blocks, had it been counted through; see `fusion.drop_rates`."""
    pool: int = 7
    """Keys of a map: the means of `pool` x `pool` parts of it."""
    ceca_residual: Literal["official", "prenorm"] = "official"
    """`prenorm`: x + attention(norm(x)), then x + MLP(norm(x)). `official`: the normalised x is what attention is added to, and
    the MLP's output is added to itself."""
    masked_pooling: bool = False
    """Whether padding is kept out of keys and depthwise convolutions. Official: it is not."""

    # decoder
    decoder: Literal["deformable", "dense"] = "deformable"
    decoded_maps: int = 4
    """How many of the fused maps the decoder reads, counted from the coarsest."""
    decoder_layers: int = 6
    points: int = 4
    """Sampled by each head in each map; deformable only."""
    ffn: int = 1024
    num_queries: int = 300
    refine: bool = True
    """Each layer moves the boxes of the one before."""
    two_stage: bool = True
    """Queries are the best proposals of the fused maps instead of learned."""
    mask_proposals: bool = False
    """Whether padding and border tokens are never proposed. Official: nothing forbids it."""
    keep_proposals: bool = False
    """Whether every token answers in evaluation too, not only while training: the same detections for more work, and
    `Output.proposals` to look at. Official: yes."""

    # location-aware heads
    iou: bool = True
    """Predict each box's overlap with its object."""
    centerness: bool = True
    """Predict how central in its object each reference lies."""
    class_power: float = 0.45
    alpha: float = 0.5
    """Of the predicted IoU in the score: class^class_power * IoU^alpha * centerness^beta."""
    beta: float = 0.05
    """Of the centerness in the score."""
    detach_iou_target: bool = False
    """Official: the IoU loss also moves the box whose overlap is its target."""
    centerness_of: Literal["reference", "box"] = "reference"
    """Whose centre the centerness is of. Official: the reference's, that is the box of the layer before."""

    # token labelling
    token_labels: bool = True
    """Learn the class of every token of the decoded maps from instance masks (boxes where there are none)."""
    object_channel: Literal["auto", "first", "last"] = "auto"
    """The token channel of "any object": the first, which COCO's raw category ids leave free, or one more behind the
    classes. `auto`: first for a model of 91 raw ids, else last."""

    # weights of the losses; class, L1 and GIoU are those of Deformable DETR
    iou_weight: float = 2.0
    centerness_weight: float = 2.0
    token_focal_weight: float = 2.0
    token_dice_weight: float = 2.0

    def __post_init__(self) -> None:
        at_least(0, self, "fuse_blocks", "class_power", "alpha", "beta")
        at_least(0, self, "iou_weight", "centerness_weight", "token_focal_weight", "token_dice_weight")
        at_least(1, self, "width", "heads", "fuse_ffn", "pool")
        at_least(1, self, "decoder_layers", "points", "ffn", "num_queries")
        probabilities(self, "dropout", "fuse_drop_path")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of 4, for the encoding of boxes")
        if not 1 <= self.decoded_maps <= self.maps:
            raise ValueError(f"decoded_maps ({self.decoded_maps}) must be 1 to {self.maps}, the fused maps")
        if self.maps < 2:
            raise ValueError("backbone.levels and coarser_map must give at least 2 maps to fuse")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine: proposals are boxes that the decoder refines")
        if self.keep_proposals and not self.two_stage:
            raise ValueError("keep_proposals needs two_stage: learned queries have no proposals")

    @property
    def maps(self) -> int:
        """How many maps are fused."""
        return len(self.backbone.levels) + self.coarser_map
