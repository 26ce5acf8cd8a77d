"""Signals that a run listens to: SIGINT and SIGTERM end it after the step at hand, a second one ends it at once; SIGUSR1, which
schedulers send some time before that, saves its state and lets it go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # not on Windows


@dataclass(slots=True)
class Noted:
    """What has come so far."""

    end: int | None = None  # the signal that ends the run
    save: bool = False  # until it was done


@contextmanager
def noted() -> Iterator[Noted]:
    """Inside, signals are only noted; afterwards they do what they did before."""
    seen = Noted()
    before: dict[signal.Signals, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        seen.end = number
        for which in ENDING:
            signal.signal(which, before.get(which, signal.SIG_DFL))

    def save(number: int, frame: FrameType | None) -> None:
        seen.save = True

    try:
        for which, handler in (dict.fromkeys(ENDING, end) | dict.fromkeys(SAVING, save)).items():
            before[which] = signal.signal(which, handler)
    except ValueError:  # not the main thread: signals are somebody else's
        before.clear()
    try:
        yield seen
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
