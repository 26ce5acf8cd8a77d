"""Who is writing a run. The system lets go of the lock when its holder ends, however it ends; a number in a file would stay.

Processes that the holder forks, as those that read pictures, do not hold it with him: they would outlive him for seconds.
"""

from __future__ import annotations

import os
import time
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from detrcli.errors import DetrError

LOCKS = find_spec("fcntl") is not None  # not on Windows: a run that died is shown as running there
_taken: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


def take(file: IO[bytes], folder: Path) -> None:
    """Hold the file of a run for as long as it is open; an error if another process does."""
    if not LOCKS:
        return
    import fcntl

    for _ in range(10):  # who looks whether it is held, holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
            continue
        except OSError:  # a file system without locks
            return
        if not _in_place(file):  # who held it has cleared the folder
            break
        _taken.add(file)
        return
    file.close()
    raise DetrError(
        f"another process is training in {folder}", hint="let it end, or stop it; see: detr runs list"
    )


def held(path: Path) -> bool:
    """Whether somebody holds the lock of a run; True also where that cannot be known."""
    if not LOCKS:
        return True
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or on a file system without locks
        return True
    finally:
        os.close(handle)
    return False


def _in_place(file: IO[bytes]) -> bool:
    """Whether it is still the file of its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    for file in list(_taken):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
