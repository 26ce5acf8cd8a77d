"""The choices of DETR, sec. 3 and appendix A.4 of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field

from detrcli.config import at_least, probabilities
from detrcli.plugins.backbones import BackboneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DetrConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    width: int = 256
    heads: int = 8
    ffn: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 100
    dropout: float = 0.1
    no_object: float = 0.1  # weight of "no object" in the class loss

    def __post_init__(self) -> None:
        at_least(0, self, "encoder_layers", "no_object")
        at_least(1, self, "width", "heads", "ffn", "decoder_layers", "num_queries")
        probabilities(self, "dropout")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of 4, for the encoding of positions")
