"""Signals that end a process, as exceptions: what is to be done at the end is done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# of which ctrl-c is none: Python makes an exception of that already; SIGHUP is not on every system
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as ctrl-c does; a second one ends it at once. Those that are somebody else's stay so."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    with suppress(ValueError):  # not the main thread
        for number in _ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)
    try:
        yield
    finally:
        for number in _ENDING:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
