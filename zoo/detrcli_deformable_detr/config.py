"""The choices of Deformable DETR: sec. 4 and appendix A.4 of the paper, and its table 1 row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

from detrcli.config import at_least, probabilities
from detrcli.plugins.backbones import BackboneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DeformableDetrConfig:
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(levels=(3, 4, 5)))
    levels: int = 4  # the backbone's, then coarser ones of stride-2 convolutions
    points: int = 4  # sampled by each head in each level
    width: int = 256
    heads: int = 8
    ffn: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 300
    dropout: float = 0.1
    refine: bool = False  # iterative bounding box refinement: each layer moves the boxes of the one before
    two_stage: bool = False  # queries are the encoder's best proposals instead of learned
    proposal_channels: int | None = None  # None: one a class, as in the released weights; 1: objectness alone
    mask_proposals: bool = True  # padding and border tokens are never proposals (official code: they may be)

    def __post_init__(self) -> None:
        at_least(0, self, "encoder_layers")
        at_least(1, self, "levels", "points", "width", "heads", "ffn")
        at_least(1, self, "decoder_layers", "num_queries", "proposal_channels")
        probabilities(self, "dropout")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.width % 32:
            raise ValueError(f"width ({self.width}) must be a multiple of 32, the groups of the projections")
        if self.levels < len(self.backbone.levels):
            maps = len(self.backbone.levels)
            raise ValueError(f"levels ({self.levels}) must be at least the backbone's maps ({maps})")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine: proposals are boxes that the decoder refines")
