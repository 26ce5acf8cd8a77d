"""A paper's numbers beside ours, counted as the paper counted: its picture sizes, its operators."""

from __future__ import annotations

from dataclasses import dataclass, replace

from detrcli.config import assign
from detrcli.plugins import Model
from detrcli.profile.formulas import Extra, extras
from detrcli.profile.run import Profile, profile
from detrcli.profile.sizes import COCO100, Size, parse_size, written

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


def against_published(found: Profile, factor: int = 1) -> list[Difference]:
    """Parameters (millions) and GFLOPs (`factor` operations a multiply-add), of parts too, where the paper gives them and
    they are of what was counted."""
    model = found.model
    published = model.variant.published
    if published is None:
        return []
    rows: list[tuple[str, float | None, float]] = []
    declared = _as_declared(model)
    if model.config in (declared.config, as_its_paper(declared).model.config):
        rows.append(("parameters (M)", published.params_m, found.params / 1e6))
    if not why_not_compared(found):
        billions = [("GFLOPs", published.gflops, found.macs)]
        for part, said in published.gflops_by_part.items():
            billions.append((of_part(part), said, found.by_part.get(part, 0.0)))
        rows += [(what, said and said * factor, ours * factor / 1e9) for what, said, ours in billions]
    return [
        Difference(what, said, ours, published.difference) for what, said, ours in rows if said is not None
    ]


def why_not_compared(found: Profile) -> str:
    """Why published GFLOPs are of something else than was counted; empty where they are not, or where there are none."""
    published = found.model.variant.published
    if published is None or (published.gflops is None and not published.gflops_by_part):
        return ""
    paper = as_its_paper(_as_declared(found.model))
    if found.model.config != paper.model.config:
        return "its paper counted another configuration"
    if found.size != written(paper.size):
        return f"its paper counted at {written(paper.size)}, this is {found.size}"
    if found.extra != paper.extra:
        return f"its paper counted {', '.join(sorted(paper.extra)) or 'nothing'} besides, not {', '.join(sorted(found.extra)) or 'nothing'}"
    return ""


def _as_declared(model: Model) -> Model:
    """The model without changes to its configuration."""
    variants = [variant for variant in model.family.variants if variant.name == model.variant.name]
    return replace(model, variant=variants[0]) if variants else model
