"""Time and memory of forward passes on this machine; several models take turns, so that a busy moment hits all alike."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detrcli.nn.speed import fastest
from detrcli.plugins import Model
from detrcli.profile.memory import refuse_if_too_large
from detrcli.profile.parts import Running, in_order
from detrcli.profile.run import memory
from detrcli.profile.sizes import Size


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one forward pass in float32, in all and by part."""

    device: str
    batch: int
    size: Size
    median: float
    p90: float
    runs: int
    by_part: dict[str, float]  # medians; the sum is a little more than the whole, for the looking costs time
    by_part_p90: dict[str, float]
    memory: (
        int | None
    )  # most bytes at once: allocated on CUDA, resident beyond the weights on a CPU that says


def latencies(
    models: Sequence[Model],
    *,
    size: Size,
    batch: int = 1,
    device: str = "cpu",
    runs: int = 10,
    warm_up: int = 2,
) -> list[Latency]:
    """Random weights and pictures: the speed of a detector depends on neither. The models take turns, run by run."""
    place = torch.device(device)
    needs = [memory(model, size=size, batch=batch) for model in models]
    largest = max(need.inference for need in needs)
    refuse_if_too_large(sum(n.weights for n in needs) + largest, place, [model.name for model in models])
    images = torch.randn(batch, 3, *size, device=place)
    nets = [fastest(model.build().to(place)) for model in models]  # as predict runs them
    with torch.inference_mode():
        peaks = [_peak(net, images) for net in nets]
        for _ in range(warm_up):
            for net in nets:
                net(images)
        rounds = [[_timed(net, images) for net in nets] for _ in range(runs)]
        parts = [
            [_timed_parts(net, model, images) for net, model in zip(nets, models, strict=True)]
            for _ in range(max(3, runs // 3))
        ]
    return [
        Latency(
            device=str(place),
            batch=batch,
            size=size,
            median=statistics.median(taken),
            p90=_p90(taken),
            runs=runs,
            by_part=_over_runs(list(split), model, statistics.median),
            by_part_p90=_over_runs(list(split), model, _p90),
            memory=peak,
        )
        for model, taken, split, peak in zip(
            models, zip(*rounds, strict=True), zip(*parts, strict=True), peaks, strict=True
        )
    ]


def _timed(net: nn.Module, images: Tensor) -> float:
    _wait(images.device)
    started = time.perf_counter()
    net(images)
    _wait(images.device)
    return time.perf_counter() - started


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _timed_parts(net: nn.Module, model: Model, images: Tensor) -> dict[str, float]:
    """Seconds by part; on CUDA by events on the stream, so that parts still overlap as they do."""
    clock = _Events() if images.device.type == "cuda" else _Clock()
    with Running(net, model.family.parts, switched=lambda: clock.switch(running.part)) as running:
        clock.start()
        net(images)
        clock.switch(running.part)
    return clock.totals()


class _Clock:
    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def start(self) -> None:
        self.switch("")

    def switch(self, part: str) -> None:
        """What ran since the last mark belonged to `part`."""
        self.marks.append((part, time.perf_counter()))

    def totals(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += now - before
        return dict(found)


class _Events(_Clock):
    """The same on a CUDA stream."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, torch.cuda.Event]] = []

    def switch(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.events.append((part, event))

    def totals(self) -> dict[str, float]:
        torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in zip(self.events, self.events[1:], strict=False):
            found[part] += before.elapsed_time(now) / 1e3
        return dict(found)


def _over_runs(
    runs: list[dict[str, float]], model: Model, summary: Callable[[list[float]], float]
) -> dict[str, float]:
    names = {name for run in runs for name in run}
    return in_order({n: summary([run.get(n, 0.0) for run in runs]) for n in names}, list(model.family.parts))


def _p90(taken: Sequence[float]) -> float:
    return sorted(taken)[min(len(taken) - 1, int(0.9 * len(taken)))]


STATUS, REFRESH = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _peak(net: nn.Module, images: Tensor) -> int | None:
    """Most bytes that a forward pass adds to what is there before it."""
    place = images.device
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        net(images)
        return torch.cuda.max_memory_allocated(place) - before
    try:
        REFRESH.write_text("5")  # Linux: the high-water mark starts again
        before = _resident("VmRSS")
        net(images)
        return max(0, _resident("VmHWM") - before)
    except (OSError, KeyError):  # another system, or a container that does not allow it
        return None


def _resident(field: str) -> int:
    rows = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(rows[field].split()[0]) * 1024
