"""A paper's numbers beside ours, each counted at the picture sizes that the paper counted at."""

from __future__ import annotations

from dataclasses import dataclass

from detrcli.profile.run import Profile

CLOSE = 2.0  # per cent; what is further needs a reason in the declaration


@dataclass(frozen=True, slots=True)
class Difference:
    """A published number beside a counted one."""

    what: str
    published: float
    counted: float
    why: str  # the declaration's reason, where there is one

    @property
    def percent(self) -> float:
        return 100 * (self.counted / self.published - 1)

    @property
    def close(self) -> bool:
        return abs(self.percent) <= CLOSE


def against_published(found: Profile) -> list[Difference]:
    """Parameters (millions) and GFLOPs where the paper gives them; the profile's size should be the paper's."""
    published = found.model.variant.published
    if published is None:
        return []
    rows = [
        ("parameters (M)", published.params_m, found.params / 1e6),
        ("GFLOPs", published.gflops, found.macs / 1e9),
    ]
    return [
        Difference(what, said, ours, published.difference) for what, said, ours in rows if said is not None
    ]
