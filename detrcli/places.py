"""Where results go: `runs/<verb>/<what>-<n>`, a new folder each time; `DETR_RUNS` moves the root."""

from __future__ import annotations

import os
import re
from pathlib import Path

from detrcli.errors import DetrError


def runs_root() -> Path:
    return Path(os.environ.get("DETR_RUNS") or "runs")


def fresh_folder(verb: str, what: str) -> Path:
    """A new folder, numbered after those that exist; nothing is ever overwritten."""
    root = runs_root() / verb
    stem = re.sub(r"[^\w.-]+", "-", what).strip("-.") or verb
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(p.name, stem) for p in root.iterdir()), default=0)
        while True:
            folder = root / f"{stem}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                number += 1
                continue
            return folder
    except OSError as error:
        raise DetrError(
            f"cannot make a folder in {root}: {error.strerror or error}", hint="choose a place with --out"
        ) from error


def _number(name: str, stem: str) -> int:
    found = re.fullmatch(re.escape(stem) + r"-(\d+)", name)
    return int(found.group(1)) if found else 0
