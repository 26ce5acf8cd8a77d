"""Where a file is made: a hidden folder beside the name that it will get, gone afterwards however that ends."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from detrcli.ending import ended_by_signal
from detrcli.errors import DetrError
from detrcli.runs import lock

LOCK = ".lock"
SUFFIX = ".making"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder in which the file `out` is whole before it gets its name."""
    with ExitStack() as stack:
        stack.enter_context(ended_by_signal())
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            clear(out)
            folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=prefix(out), suffix=SUFFIX))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(held(folder))
        except OSError as error:
            raise cannot_write(out, error) from error
        yield folder


def parts(folder: Path, out: Path) -> list[Path]:
    """The files that were made there, the one called like `out` last: the weights of an OpenVINO model come before the model."""
    made = [file for file in folder.iterdir() if file.name != LOCK]
    return sorted(made, key=lambda file: (file.name == out.name, file.name))


def prefix(out: Path) -> str:
    return f".{out.name}."


def clear(out: Path) -> None:
    """Remove what processes left behind that were killed while they made this file. A folder without a lock may be anybody's."""
    with suppress(OSError):  # a folder that may be written to, but not listed
        for folder in list(out.parent.iterdir()):
            if folder.name.startswith(prefix(out)) and folder.name.endswith(SUFFIX) and abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def abandoned(folder: Path) -> bool:
    with suppress(OSError):  # another user's
        return not folder.is_symlink() and (folder / LOCK).is_file() and not lock.held(folder / LOCK)
    return False


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is in use. Its lock gets its name when it is taken: who finds one that nobody holds may remove the folder."""
    if not lock.LOCKS:
        yield
        return
    new = folder / f"{LOCK}.new"
    with new.open("wb") as file:
        lock.take(file, folder)
        new.rename(folder / LOCK)
        yield


def cannot_write(out: Path, error: OSError) -> DetrError:
    """In words what the system said, and of which file if that is not `out`."""
    said = error.strerror or " ".join(str(error).split()) or type(error).__name__
    elsewhere = (
        error.filename is not None and out.parent.absolute() not in Path(error.filename).absolute().parents
    )
    if elsewhere:
        said = f"{said}: {os.fspath(error.filename)}"
    if error.errno in FULL:
        hint = "free some space, or choose another --out"
    elif error.errno in FORBIDDEN:
        hint = "choose a folder you may write to with --out"
    else:
        hint = "see that there is space and that you may write there, or choose another --out"
    return DetrError(f"cannot write {out}: {said}", hint=hint)
