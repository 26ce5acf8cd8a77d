"""Where run folders are, and how a new one is made: `runs/<verb>/<label>-<n>/`, never overwritten."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from detrcli.errors import DetrError


def root(verb: str) -> Path:
    """`$DETR_RUNS/<verb>`, else `./runs/<verb>`."""
    return Path(os.environ.get("DETR_RUNS") or "runs") / verb


def new_run(verb: str, label: str, out: Path | None = None) -> Path:
    """A fresh folder: `out`, or the next number of `label`. Two processes at once get two folders."""
    if out is not None:
        return fresh(out)
    base = root(verb)
    label = re.sub(r"[^\w.-]+", "-", label).strip("-.") or verb
    taken = [number for path in base.glob(f"{label}-*") if (number := _number(path, label))]
    for number in range(max(taken, default=0) + 1, 1_000_000):
        try:
            return _made(base / f"{label}-{number}")
        except FileExistsError:
            continue
    raise DetrError(f"no free folder name for {label} in {base}", hint="choose one with --out")


def check_place(verb: str, out: Path | None = None) -> None:
    """An error where `new_run` would fail, for those who need it only after their work; a folder that is made stays."""
    if out is None:
        _content(root(verb))
    else:
        fresh(out)


def _number(path: Path, label: str) -> int | None:
    suffix = path.name[len(label) + 1 :]
    return int(suffix) if suffix.isdigit() else None


def fresh(out: Path, but: str = "") -> Path:
    """The folder, made where it is not there; an error if there is anything in it but that file."""
    if any(name != but for name in _content(out)):
        raise DetrError(
            f"{out} exists and is not empty; runs are never overwritten", hint="choose another --out"
        )
    return out


def _content(folder: Path) -> list[str]:
    """What is in a folder that may be written in; it is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os.listdir(folder)
    except OSError as error:
        raise _refused(f"make files in {folder}", error) from error


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise _refused(f"make {path}", error) from error
    return path


def _refused(what: str, error: OSError) -> DetrError:
    return DetrError(
        f"cannot {what}: {error.strerror or error}",
        hint="choose a place you may write to with --out or DETR_RUNS",
    )
