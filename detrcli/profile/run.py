"""`profile`: what a model costs, by part, at one size or averaged as the papers do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from detrcli.plugins import Model
from detrcli.profile.counting import Counts, count
from detrcli.profile.formulas import Extra
from detrcli.profile.memory import saved_for_backward, trained
from detrcli.profile.parts import in_order
from detrcli.profile.sizes import COCO100, Size, checked, coco100_sizes, written

TYPICAL: Size = (800, 1066)  # where one size must stand for all: time and memory


@dataclass(frozen=True, slots=True)
class Profile:
    """The cost of one model. `macs` are multiply-adds a picture; parts stand in the order of the network."""

    model: Model
    size: str
    params: int
    trainable: int
    params_by_part: dict[str, int]
    macs: float
    by_part: dict[str, float]
    by_operator: dict[str, float]
    moved_by_part: dict[str, float]  # bytes a picture that the operators read and write
    tokens: tuple[float, ...]  # positions of each scale, finest first
    queries: dict[str, float]  # by part, those that sample the scales
    unknown: dict[str, int]  # operators that nobody can count, with their calls
    extra: frozenset[Extra]  # operators that were counted besides the usual ones


def build_on_meta(model: Model, num_classes: int | None = None) -> nn.Module:
    with torch.device("meta"):
        return model.build(num_classes).eval()


def profile(
    model: Model,
    *,
    size: str | Size = COCO100,
    batch: int = 1,
    num_classes: int | None = None,
    extra: frozenset[Extra] = frozenset(),
) -> Profile:
    """Count on the meta device; nothing is executed and nothing allocated."""
    module = build_on_meta(model, num_classes)
    sizes = coco100_sizes() if size == COCO100 else Counter({checked(size): 1})
    counts = [(count(module, model.family.parts, batch, one, extra), times) for one, times in sizes.items()]
    by_part = _mean([(c.by_part(), n) for c, n in counts], batch)
    scales = [({str(i): float(h * w) for i, (h, w) in enumerate(c.scales)}, n) for c, n in counts]
    return Profile(
        model=model,
        size=written(size),
        params=sum(p.numel() for p in module.parameters()),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        params_by_part=_params_by_part(module, model),
        macs=sum(by_part.values()),
        by_part=in_order(by_part, list(model.family.parts)),
        by_operator=_mean([(c.by_operator(), n) for c, n in counts], batch),
        moved_by_part=in_order(_mean([(c.moved, n) for c, n in counts], batch), list(model.family.parts)),
        tokens=tuple(_mean(scales).values()),
        queries=_mean([({k: float(v) for k, v in c.queries.items()}, n) for c, n in counts]),
        unknown=dict(_most([c for c, _ in counts])),
        extra=extra,
    )


def _mean(tables: Sequence[tuple[Mapping[str, float], int]], batch: int = 1) -> dict[str, float]:
    """Over all pictures: tables of sums, each of `batch` pictures, with how often it comes."""
    pictures = batch * sum(times for _, times in tables)
    total: Counter[str] = Counter()
    for table, times in tables:
        total.update({name: value * times / pictures for name, value in table.items()})
    return dict(total)


def _most(counts: list[Counts]) -> Counter[str]:
    unknown: Counter[str] = Counter()
    for one in counts:
        unknown |= one.unknown
    return unknown


def _params_by_part(module: nn.Module, model: Model) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        for part, paths in model.family.parts.items():
            if any(name == path or name.startswith(path + ".") for path in paths):
                found[part] += parameter.numel()
    return {part: found[part] for part in model.family.parts if found[part]}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in float32 with operators in plain torch, found without running anything."""

    batch: int
    size: Size
    weights: int
    inference: int  # most activations that live at once while predicting, weights not counted
    training: int  # weights, gradients, Adam's moments and what the forward pass keeps


def memory(model: Model, *, size: str | Size = COCO100, batch: int = 1) -> Memory:
    module = build_on_meta(model)
    one = TYPICAL if isinstance(size, str) else checked(size)
    peak = count(module, model.family.parts, batch, one).peak
    kept = saved_for_backward(module, batch, one)  # at the end; more may be alive on the way there
    training = trained(module) + max(kept, peak)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return Memory(batch, one, weights, peak, training)
