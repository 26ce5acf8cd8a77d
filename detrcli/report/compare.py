"""Runs side by side: what was set differently, and how long each took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detrcli.runs import Run


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with the value of each run; what not all of them have is left out,
    since other models have other settings."""
    first, *others = [run.settings() for run in runs]
    shared = [path for path in first if all(path in table for table in others)]
    values = {path: [first[path], *(table[path] for table in others)] for path in shared}
    return {path: found for path, found in values.items() if any(value != found[0] for value in found)}


def duration(run: Run) -> str | None:
    """How long it ran, as 1:02:03."""
    return None if run.seconds is None else clock(run.seconds)


def clock(seconds: float) -> str:
    """3723 as 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
