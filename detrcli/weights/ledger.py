"""What this machine remembers of files from the Hub: the commit a reference meant first, and the hash of what came.

One small JSON file a reference, under `$DETR_HOME/hub/`. It lets an unpinned reference keep its meaning, shows a changed file,
and saves hashing a file again whose size and time are as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from detrcli.errors import DetrError
from detrcli.files import home, replacing


@dataclass(frozen=True, slots=True)
class Record:
    repo: str
    requested: str  # the revision as it was asked for
    file: str
    commit: str
    sha256: str
    blob: str  # where the bytes lay when they were hashed, their size and time
    size: int
    mtime_ns: int

    @property
    def place(self) -> Path:
        return _place(self.repo, self.requested, self.file)

    def hash_of(self, blob: Path) -> str | None:
        """The known hash of an unchanged file; None means: read it."""
        state = blob.stat()
        unchanged = (str(blob), state.st_size, state.st_mtime_ns) == (self.blob, self.size, self.mtime_ns)
        return self.sha256 if unchanged else None

    def write(self) -> None:
        """Remember; a folder that cannot be written costs a hash next time, no more."""
        with contextlib.suppress(DetrError), replacing(self.place) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))


def find(repo: str, requested: str, file: str) -> Record | None:
    """The record of a reference; one that cannot be read counts as none."""
    try:
        return Record(**json.loads(_place(repo, requested, file).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def folder(repo: str) -> Path:
    return home() / "hub" / repo.replace("/", "--")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(repo: str, requested: str, file: str) -> Path:
    key = hashlib.sha256(f"{requested}:{file}".encode()).hexdigest()[:16]
    return folder(repo) / f"{key}.json"
