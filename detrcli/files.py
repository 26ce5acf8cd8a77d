"""Files that are whole or not there, and the place where detrcli keeps what it remembers on this machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from detrcli.errors import DetrError


def check_writable(path: Path) -> None:
    """Tell before long work that its file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write in place of `path`, which it becomes on leaving; on failure the old file stays as it was.

    The file is flushed before the rename and its folder after it, so that a crash leaves the old file or the new one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_mode())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """Results are written: what the system refuses ("in FOLDER", "on stdout") is no defect of ours."""
    try:
        yield
    except BrokenPipeError:  # the reader has what it wanted
        raise
    except OSError as error:
        raise DetrError(
            f"cannot write {where}: {error.strerror or error}",
            hint="free some space, or choose another --out",
        ) from error


def left_over(folder: Path) -> list[Path]:
    """What `replacing` had in hand there when its process was killed."""
    return list(folder.glob(".*.tmp"))


def home() -> Path:
    """`$DETR_HOME`, else `detrcli` in the user's cache folder."""
    if chosen := os.environ.get("DETR_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "detrcli"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode() -> int:
    """What a file made with open() would get; temporary files are private otherwise."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def cannot_write(path: Path, error: OSError) -> DetrError:
    """What the system refuses: exit code 1 whatever was to be written."""
    return DetrError(
        f"cannot write {path}: {error.strerror or error}",
        hint="free some space, or choose a folder you may write to; what was there before is unchanged",
    )
