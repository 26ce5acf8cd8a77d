"""How a variant names its backbone. Here, not beside the network, because declarations are free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detrcli.config import probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig:
    """Which timm network, which of its maps, and what stays fixed."""

    name: str = "resnet50"
    levels: tuple[int, ...] = (5,)  # maps by their number: level l has stride 2**l
    norm: Literal["frozen", "group", "default"] = "frozen"
    dilated: bool = False  # DC5: the last stage keeps the stride before it
    frozen: tuple[str, ...] = ("conv1", "layer1")  # module prefixes that are never trained
    drop_path: float = 0.0  # stochastic depth of the last block while training; earlier blocks have less
    pretrained: str | None = "resnet50.tv_in1k"  # the timm weights that training from scratch starts from

    def __post_init__(self) -> None:
        probabilities(self, "drop_path")
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(
                f"levels must be one or more that rise, such as [3, 4, 5], not {list(self.levels)}"
            )

    @property
    def starts_from(self) -> str | None:
        """`pretrained`, unless the network is another one by now: then that one's own weights."""
        if self.pretrained is None or self.pretrained.split(".")[0] == self.name.split(".")[0]:
            return self.pretrained
        return self.name
