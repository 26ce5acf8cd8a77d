"""Every error a user can cause, as a tree.

    DetrError                 1   something failed while running
    ├── UsageError            2   a name, flag or value that means nothing here
    ├── DataError             3   a data set or annotation file that cannot be used
    ├── ModelError            4   a model, plugin or weights file that cannot be used
    │   ├── PluginError           a plugin that does not load
    │   ├── CheckpointError       a file that is damaged, or of another model
    │   └── HubError              a download that failed
    ├── VerificationError     5   an exported or downloaded file whose answers differ
    └── PartialError          6   some inputs failed, the others were done

The number is the exit code. Each error says what failed, why, and what to type next (`hint`).
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable

FEW = 12  # names that can be told all


class DetrError(Exception):
    """Something failed; shown to the user as one line and a hint, never as a traceback."""

    exit_code = 1
    kind = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DetrError):
    exit_code = 2
    kind = "usage"


class DataError(DetrError):
    exit_code = 3
    kind = "data"


class ImageError(DataError):
    """One picture that cannot be read; `predict` counts it, `train` names it."""

    kind = "image"


class ModelError(DetrError):
    exit_code = 4
    kind = "model"


class PluginError(ModelError):
    kind = "plugin"


class CheckpointError(ModelError):
    kind = "checkpoint"


class HubError(ModelError):
    kind = "hub"


class VerificationError(DetrError):
    exit_code = 5
    kind = "verification"


class PartialError(DetrError):
    exit_code = 6
    kind = "partial"


class NonFiniteError(DetrError):
    """A loss, prediction or gradient that is NaN or infinite."""

    kind = "non-finite"


def typed(*words: object) -> str:
    """Words as a shell takes them, for the commands in hints: what has a space in it stands in quotes.

    >>> typed("detr", "data", "check", "my data")
    "detr data check 'my data'"
    """
    return shlex.join(map(str, words))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; empty when none is near."""
    fold = {k.lower().replace("_", "-"): k for k in known}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), fold, n=count, cutoff=0.5)
    return [fold[k] for k in near]


def unknown(what: str, name: str, known: Iterable[str], *, see: str | None = None) -> UsageError:
    """The error for a name that is not among the known ones, with the nearest as the hint, and all where they are few."""
    known = list(known)
    near = nearest(name, known)
    hints = [f"did you mean {' or '.join(repr(n) for n in near)}?"] if near else []
    if len(near) < len(known) <= FEW:
        hints.append(f"known: {', '.join(known)}")
    elif see and not near:
        hints.append(f"see: {see}")
    return UsageError(f"unknown {what} {name!r}", hint=" ".join(hints) or None)
