"""What bounds each part on this machine: arithmetic, or moving its data.

Two figures are measured here, the fastest matrix product and the fastest copy. A part that does few operations a byte cannot be
faster than the copy allows, one that does many cannot be faster than the product; how near it comes is its share of the roof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from detrcli.profile.run import Profile
from detrcli.profile.timing import Latency

SIDE = 1024  # of the matrices of the fastest product
COPIED = 1 << 26  # floats of the copy: more than any cache holds
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations a second (two a multiply-add) and bytes a second, both in float32."""

    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """Operations a byte above which arithmetic is the bound."""
        return self.flops / self.bandwidth


@dataclass(frozen=True, slots=True)
class Bound:
    part: str
    intensity: float  # operations a byte
    speed: float  # operations a second that were reached
    by: Literal["arithmetic", "memory"]
    share: float  # of what the machine could do at this intensity


def measure(device: str) -> Machine:
    place = torch.device(device)
    side = SIDE * (8 if place.type == "cuda" else 1)
    a, b = torch.randn(2, side, side, device=place)
    floats = torch.zeros(COPIED, device=place)
    target = torch.empty_like(floats)
    product = _fastest(lambda: torch.mm(a, b), place)
    copy = _fastest(lambda: target.copy_(floats), place)
    return Machine(flops=2 * side**3 / product, bandwidth=2 * floats.nbytes / copy)


def _fastest(work: Callable[[], object], place: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def bounds(found: Profile, timed: Latency, machine: Machine) -> list[Bound]:
    """One line a part; the profile must be of the size that was timed."""
    rows = []
    for part, seconds in timed.by_part.items():
        flops = 2 * found.by_part.get(part, 0.0) * timed.batch
        moved = found.moved_by_part.get(part, 0.0) * timed.batch
        if not (flops and moved and seconds):
            continue
        intensity = flops / moved
        roof = min(machine.flops, intensity * machine.bandwidth)
        by: Literal["arithmetic", "memory"] = "arithmetic" if intensity >= machine.ridge else "memory"
        rows.append(Bound(part, intensity, flops / seconds, by, flops / seconds / roof))
    return rows
