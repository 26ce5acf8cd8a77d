"""The numbers of a run, from its `metrics.jsonl`: one line a step, one an evaluation.

A run of a million steps is read in one pass into a bounded number of points, each the mean of as many steps as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from detrcli.runs.reading import lines, number, table

METRICS_FILE = "metrics.jsonl"
POINTS = 1000  # kept for a curve, at least, where there are so many
NAMES = 500  # of what can be measured; more are left out

Row = Mapping[str, float]


@dataclass(slots=True)
class History:
    """What was measured, in order; `steps` are means of `stride` neighbours once there are too many to keep."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    stride: int = 1
    damaged: int = 0  # lines that could not be read

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps, and the values that `name` had at them."""
        rows = self.steps if any(name in row for row in self.steps) else self.evaluations
        pairs = [(row["step"], row[name]) for row in rows if name in row]
        return [x for x, _ in pairs], [y for _, y in pairs]

    @property
    def terms(self) -> list[str]:
        """The names of the loss's terms, in order."""
        beside = {"step", "epoch", "loss", "lr", "grad_norm", "seconds", "waited"}
        return [
            name for name in dict.fromkeys(name for row in self.steps for name in row) if name not in beside
        ]


def read_history(folder: Path) -> History:
    """Everything there is; an empty history where there is nothing to read."""
    steps, evaluations, damaged = _Means(), _Means(), 0
    for row in rows(folder):
        if row is None:
            damaged += 1
        else:
            (steps if "loss" in row else evaluations).add(row)
    return History(steps.points(), evaluations.points(), steps.stride, damaged)


def rows(folder: Path) -> Iterator[dict[str, float] | None]:
    """The lines of a run's metrics, None for one that is no row of numbers with a step."""
    known = {"step", "epoch", "loss"}
    try:
        for line in lines(folder / METRICS_FILE):
            found = _numbers(table(line) or {}, known)
            yield found if "step" in found else None
    except (OSError, ValueError):
        return


def _numbers(said: Mapping[str, object], known: set[str]) -> dict[str, float]:
    """The finite numbers of a line, as long as their names are not endless."""
    found = {}
    for name, value in said.items():
        if (n := number(value)) is not None and (name in known or len(known) < NAMES):
            known.add(name)
            found[name] = n
    return found


class _Means:
    """Rows in order; when there are twice as many as wanted, neighbours are joined two by two."""

    def __init__(self) -> None:
        self.stride = 1
        self._sums: list[dict[str, tuple[float, int]]] = []
        self._filled = 0  # rows in the last point

    def add(self, row: Row) -> None:
        if self._filled in (0, self.stride):
            if len(self._sums) == 2 * POINTS:
                self._sums = [_joined(a, b) for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
                self.stride *= 2
            self._sums.append({})
            self._filled = 0
        self._sums[-1] = _joined(self._sums[-1], {name: (value, 1) for name, value in row.items()})
        self._filled += 1

    def points(self) -> list[dict[str, float]]:
        return [{name: total / count for name, (total, count) in point.items()} for point in self._sums]


def _joined(a: dict[str, tuple[float, int]], b: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    joined = dict(a)
    for name, (total, count) in b.items():
        before = joined.get(name, (0.0, 0))
        joined[name] = (before[0] + total, before[1] + count)
    return joined
