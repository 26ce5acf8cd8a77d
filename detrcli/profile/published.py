"""A paper's numbers beside ours, counted as the paper counted: its picture sizes, its operators."""

from __future__ import annotations

from dataclasses import dataclass

from detrcli.config import assign
from detrcli.plugins import Model
from detrcli.profile.formulas import Extra, extras
from detrcli.profile.run import Profile, profile
from detrcli.profile.sizes import COCO100, Size, parse_size

CLOSE = 2.0  # per cent; what is further needs a reason in the declaration


@dataclass(frozen=True, slots=True)
class Counting:
    """What is counted: a model, the sizes of its pictures, the operators besides the usual ones."""

    model: Model
    size: str | Size = COCO100
    extra: frozenset[Extra] = frozenset()

    def profile(self, batch: int = 1) -> Profile:
        return profile(self.model, size=self.size, batch=batch, extra=self.extra)


def as_its_paper(model: Model) -> Counting:
    published = model.variant.published
    if published is None:
        return Counting(model)
    counted = model.configured(assign(model.config, published.gflops_set))
    return Counting(counted, parse_size(published.gflops_at), extras(published.gflops_also))


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


def of_part(part: str) -> str:
    """What the difference of a part is called."""
    return f"{part} GFLOPs"


def against_published(found: Profile) -> list[Difference]:
    """Parameters (millions) and GFLOPs, of parts too, where the paper gives them; the profile should have been made
    `as_its_paper`."""
    published = found.model.variant.published
    if published is None:
        return []
    rows = [
        ("parameters (M)", published.params_m, found.params / 1e6),
        ("GFLOPs", published.gflops, found.macs / 1e9),
    ]
    for part, said in published.gflops_by_part.items():
        rows.append((of_part(part), said, found.by_part.get(part, 0.0) / 1e9))
    return [
        Difference(what, said, ours, published.difference) for what, said, ours in rows if said is not None
    ]
