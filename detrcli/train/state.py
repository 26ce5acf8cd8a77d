"""What `--resume` continues from: `state.pt`, and `state-before.pt`, the one that it replaced.

A crash at any moment leaves one of the two whole: the new file is written beside them and takes its name when it is on the
disk. Randomness is counted from the step, so no generator is among what is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrcli.errors import CheckpointError, typed
from detrcli.files import replacing
from detrcli.weights.file import save_torch

STATE, BEFORE = "state.pt", "state-before.pt"

logger = logging.getLogger(__name__)


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write the state; on failure a `DetrError`, and the old ones stay."""
    path = folder / STATE
    with replacing(path) as temporary:
        save_torch(temporary, {**content, "sha256": digest(content)})
        if path.exists():
            os.replace(path, folder / BEFORE)


def exists(folder: Path) -> bool:
    return (folder / STATE).exists() or (folder / BEFORE).exists()


def step_back(folder: Path) -> bool:
    """Let the state before the newest take its place, if there is one."""
    try:
        os.replace(folder / BEFORE, folder / STATE)
    except OSError:
        return False
    return True


def read(folder: Path) -> dict[str, Any]:
    """The newest whole state; only tensors and plain values are ever built from the file."""
    return newest(folder)[0]


def newest(folder: Path) -> tuple[dict[str, Any], bool]:
    """The newest whole state, and whether it is the one before the newest, which is damaged then or not there."""
    try:
        return _load(folder / STATE), False
    except DamagedError as error:
        if not (folder / BEFORE).exists():
            raise
        before = _load(folder / BEFORE)
        logger.warning(
            "%s; going on from the one before it, %s of step %s", error.message, BEFORE, before.get("step")
        )
        return before, True


class DamagedError(CheckpointError):
    """A state that nothing can be gone on from; the one before it may be whole."""


def _load(path: Path) -> dict[str, Any]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise _damaged(path, "is not there") from error
    except PermissionError as error:  # it may be whole: an older one is not taken unasked
        raise CheckpointError(
            f"{path} may not be read: {error.strerror}", hint="change who may read it, and resume again"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _damaged(path, "is damaged: it is cut short, or no state at all") from error
    if not isinstance(state, dict) or state.pop("sha256", None) != digest(state):
        raise _damaged(path, "is damaged: its content has changed since it was written")
    return state


def _damaged(path: Path, what: str) -> DamagedError:
    last = path.with_name("last.safetensors")
    anew = f"start a new run from its weights: {typed('--weights', last)}" if last.exists() else None
    return DamagedError(f"{path} {what}", hint=anew or "begin anew: there are no weights to start from")


def digest(value: Any) -> str:
    """A sha256 over tensors and plain values; torch's own format does not notice a flipped bit."""
    running = hashlib.sha256()
    for piece in _pieces(value):
        running.update(piece)
    return running.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key in value:
            yield f"{key!r}:".encode()
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield repr(value).encode()
