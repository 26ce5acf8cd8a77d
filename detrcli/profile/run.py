"""`profile`: what a model costs, by part, at a size or as the papers average it."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from detrcli.errors import UsageError
from detrcli.plugins import Model
from detrcli.profile.counting import Counts, count

Size = tuple[int, int]  # height, width
COCO100 = "coco100"
SMALLEST = 32


@dataclass(frozen=True, slots=True)
class Profile:
    """The cost of one model. `macs` are multiply-adds a picture, `by_part` in the order of the network."""

    model: Model
    size: str
    params: int
    trainable: int
    params_by_part: dict[str, int]
    macs: float
    by_part: dict[str, float]
    by_operator: dict[str, float]
    unknown: dict[str, int] = field(default_factory=dict)


def profile(
    model: Model, *, size: str | Size = COCO100, batch: int = 1, num_classes: int | None = None
) -> Profile:
    """Count on the meta device; nothing is executed and nothing allocated."""
    with torch.device("meta"):
        module = model.build(num_classes).eval()
    sizes = coco100_sizes() if size == COCO100 else Counter({_checked(size): 1})
    images = sum(sizes.values())
    total = Counts()
    for one, times in sizes.items():
        counts = count(module, model.family.parts, batch, one)
        for key, value in counts.macs.items():
            total.macs[key] += value * times
        total.unknown |= counts.unknown
    share = 1 / (images * batch)
    return Profile(
        model=model,
        size=COCO100 if size == COCO100 else "x".join(map(str, _checked(size))),
        params=sum(p.numel() for p in module.parameters()),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        params_by_part=_params_by_part(module, model),
        macs=total.total * share,
        by_part={part: value * share for part, value in _ordered(total.by_part(), model).items()},
        by_operator={name: value * share for name, value in total.by_operator().items()},
        unknown=dict(total.unknown),
    )


def coco100_sizes() -> Counter[Size]:
    """The sizes of the first 100 pictures of COCO val2017 after the usual resize, over which the papers average.

    A picture and its transpose cost the same. Pictures with equally large maps at stride 32 are counted as one, at their mean
    size: the average changes by less than 0.1 %, in a third of the time.
    """
    table = json.loads((files(__package__) / "coco100.json").read_text())
    alike: dict[Size, list[Size]] = {}
    for sides in table["sizes"]:
        low, high = sorted(sides)
        alike.setdefault((-(-low // 32), -(-high // 32)), []).append((low, high))
    return Counter(
        {
            (_mean(low), _mean(high)): len(low)
            for low, high in (zip(*group, strict=True) for group in alike.values())
        }
    )


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


def parse_size(text: str) -> str | Size:
    """`coco100`, or `HEIGHTxWIDTH`."""
    if text == COCO100:
        return text
    height, by, width = text.lower().partition("x")
    if not (by and height.isdigit() and width.isdigit()):
        raise UsageError(
            f"a size is HEIGHTxWIDTH or coco100 (value given: {text!r})", hint="for example: --size 800x1066"
        )
    return _checked((int(height), int(width)))


def _checked(size: str | Size) -> Size:
    if isinstance(size, str):
        raise UsageError(f"unknown size {size!r}", hint="coco100, or height and width")
    if min(size) < SMALLEST:
        raise UsageError(
            f"{size[0]}x{size[1]} is below one cell of the coarsest map ({SMALLEST} px)",
            hint="take a larger --size",
        )
    return size


def _params_by_part(module: nn.Module, model: Model) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        for part, paths in model.family.parts.items():
            if any(name == path or name.startswith(path + ".") for path in paths):
                found[part] += parameter.numel()
    return {part: found[part] for part in model.family.parts if found[part]}


def _ordered(by_part: dict[str, float], model: Model) -> dict[str, float]:
    """Parts in declared order, each followed by its layers; a part's own figure includes them."""
    ordered: dict[str, float] = {}
    for part in (*model.family.parts, "other"):
        layers = {k: v for k, v in by_part.items() if k.startswith(f"{part}.")}
        whole = by_part.get(part, 0.0) + sum(layers.values())
        if whole:
            ordered[part] = whole
            ordered |= dict(sorted(layers.items(), key=lambda item: int(item[0].rsplit(".", 1)[1])))
    return ordered


@dataclass(frozen=True, slots=True)
class Difference:
    """A published number beside a counted one."""

    what: str
    published: float
    counted: float

    @property
    def percent(self) -> float:
        return 100 * (self.counted / self.published - 1)


def against_published(found: Profile) -> list[Difference]:
    """Parameters (millions) and GFLOPs where the paper gives them."""
    published = found.model.variant.published
    if published is None:
        return []
    rows = [
        ("parameters (M)", published.params_m, found.params / 1e6),
        ("GFLOPs", published.gflops, found.macs / 1e9),
    ]
    return [Difference(what, said, counted) for what, said, counted in rows if said is not None]


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one forward pass, and the largest memory it took."""

    device: str
    batch: int
    size: Size
    median: float
    p90: float
    runs: int
    memory: int | None  # bytes allocated at most, on CUDA


def latency(
    model: Model, *, size: Size, batch: int = 1, device: str = "cpu", runs: int = 10, warm_up: int = 2
) -> Latency:
    """Time random weights on random pictures: the speed of a detector does not depend on either."""
    place = torch.device(device)
    module = model.build().eval().to(place)
    images = torch.randn(batch, 3, *size, device=place)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    with torch.inference_mode():
        for _ in range(warm_up):
            module(images)
        taken = sorted(_timed(module, images, place) for _ in range(runs))
    return Latency(
        device=str(place),
        batch=batch,
        size=size,
        median=statistics.median(taken),
        p90=taken[min(len(taken) - 1, int(0.9 * len(taken)))],
        runs=runs,
        memory=torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
    )


def _timed(module: Any, images: torch.Tensor, place: torch.device) -> float:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    started = time.perf_counter()
    module(images)
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - started
