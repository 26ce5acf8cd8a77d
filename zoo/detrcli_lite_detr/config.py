"""The choices of Lite DETR: the schedule of its encoder, and the hosts it is put into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from detrcli.config import at_least, in_range, probabilities
from detrcli.plugins.backbones import BackboneConfig
from detrcli_deformable_detr.config import DeformableDetrConfig

QUESTION = "which row of the table it is"  # no tensor tells the number of high levels
Kind = Literal["high", "low", "full"]  # which tokens a layer updates: of high levels, of low ones, all


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaving:
    """The paper's HxLy-(A+1)xB: x high levels, B blocks. No default for either: no tensor tells them apart."""

    high_levels: int = field(  # the coarsest levels, whose tokens every layer updates; the others are low
        metadata={"question": "which row of the table is it? Its name begins with H3L1 or H2L2"}
    )
    blocks: int  # each ends with one update of the low levels
    reading: Literal["released", "paper"] = "released"  # of a block, see `schedule`
    low_ffn: int | None = 256  # hidden width of the low tokens' feed-forward; None: they share the large one
    key_aware: bool = True  # False: plain deformable attention
    own_keys: bool = False  # keys have a projection of their own; as released they are the values
    shared_offsets: bool = False  # one set of sampling offsets for all levels

    def __post_init__(self) -> None:
        at_least(1, self, "blocks", "low_ffn")
        if not self.key_aware and (self.own_keys or self.shared_offsets):
            raise ValueError("own_keys and shared_offsets are choices of key_aware attention")

    def check(self, levels: int, layers: int) -> None:
        """Whether a host with so many levels and encoder layers can be interleaved so."""
        if levels < 2:
            raise ValueError(f"host.levels ({levels}) must be at least 2: one high and one low")
        if not 1 <= self.high_levels < levels:
            raise ValueError(f"encoder.high_levels ({self.high_levels}) must be between 1 and {levels - 1}")
        in_range("host.encoder_layers", layers, 1)
        if layers % self.blocks:
            raise ValueError(
                f"encoder.blocks ({self.blocks}) must divide host.encoder_layers ({layers}) without rest"
            )


def schedule(
    layers: int, blocks: int, reading: Literal["released", "paper"] = "released"
) -> tuple[Kind, ...]:
    """What each layer updates. In both readings high tokens are updated `layers` times, low ones `blocks` times.

    >>> schedule(6, 3)
    ('high', 'full', 'high', 'full', 'high', 'full')
    >>> schedule(6, 1)
    ('high', 'high', 'high', 'high', 'high', 'full')
    >>> schedule(6, 3, "paper")
    ('high', 'high', 'low', 'high', 'high', 'low', 'high', 'high', 'low')

    The released code, and so its weights, joins the last update of the high tokens with that of the low ones: both read what
    was there before. Figure 2 of the paper draws one after the other.
    """
    updates = layers // blocks
    high: tuple[Kind, ...] = ("high",)
    block = (*high * (updates - 1), "full") if reading == "released" else (*high * updates, "low")
    return block * blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteDeformableConfig:
    """Deformable DETR, with two stages and refinement, around the interleaved encoder."""

    host: DeformableDetrConfig = field(
        default_factory=lambda: DeformableDetrConfig(refine=True, two_stage=True)
    )
    encoder: Interleaving

    def __post_init__(self) -> None:
        self.encoder.check(self.host.levels, self.host.encoder_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class DinoConfig:
    """DINO (arXiv 2203.03605), 4-scale: the better host of the paper's table 4, and a model of its own."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(levels=(3, 4, 5)))
    levels: int = 4
    points: int = 4
    width: int = 256
    heads: int = 8
    ffn: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 900
    dropout: float = 0.0
    denoising: int = 100  # positive queries made of the objects, see `denoising.count_groups`; 0: none
    label_noise: float = 0.5  # twice the share of their labels that are drawn anew
    box_noise: float = 1.0  # how far their corners move, in halves of the box
    top: int = 300  # detections a picture

    def __post_init__(self) -> None:
        at_least(0, self, "encoder_layers")
        at_least(1, self, "levels", "points", "width", "heads", "ffn", "decoder_layers", "num_queries", "top")
        probabilities(self, "dropout")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.width % 32:
            raise ValueError(f"width ({self.width}) must be a multiple of 32, the groups of the projections")
        if self.levels < len(self.backbone.levels):
            maps = len(self.backbone.levels)
            raise ValueError(f"levels ({self.levels}) must be at least the backbone's maps ({maps})")
        if self.denoising < 0:
            raise ValueError(f"denoising ({self.denoising}) must not be negative; 0 means none")
        if not 0 <= self.label_noise <= 2:
            raise ValueError(f"label_noise ({self.label_noise}) must be between 0 and 2")
        if self.box_noise < 0:
            raise ValueError(f"box_noise ({self.box_noise}) must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteDinoConfig:
    """DINO around the interleaved encoder; key-aware attention, where chosen, is in the decoder too."""

    host: DinoConfig = field(default_factory=DinoConfig)
    encoder: Interleaving

    def __post_init__(self) -> None:
        self.encoder.check(self.host.levels, self.host.encoder_layers)
