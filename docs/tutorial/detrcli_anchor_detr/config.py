"""The choices of Anchor DETR, sec. 4.1 of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field

from detrcli.config import at_least, probabilities
from detrcli.plugins.backbones import BackboneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorDetrConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    width: int = 256
    heads: int = 8
    ffn: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    anchors: int = 300  # points that queries look from
    patterns: int = 3  # queries a point
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, self, "encoder_layers")
        at_least(1, self, "width", "heads", "ffn", "decoder_layers", "anchors", "patterns")
        probabilities(self, "dropout")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.width % 4:
            raise ValueError(
                f"width ({self.width}) must be a multiple of 4: y and x each need sines and cosines"
            )
