"""SIGINT and SIGTERM end a run after the step at hand; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Inside, the function tells which signal has come, if any; afterwards signals do what they did before."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)

    before: dict[signal.Signals, Any] = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, note)
    except ValueError:  # not the main thread: signals are somebody else's
        before.clear()
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
