"""Where named data sets are looked up; light enough for shell completion.

--data-root FOLDER, the folders of DETR_DATA, ./data     a folder of that name
./datasets.toml, ~/.config/detrcli/datasets.toml         a table of that name
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from detrcli.errors import DataError

BUILT_IN = ("coco", "shapes", "shapes:hard")


def roots(data_root: Path | None = None) -> list[Path]:
    """Folders of data sets, the first to be asked first."""
    listed = [Path(p).expanduser() for p in os.environ.get("DETR_DATA", "").split(os.pathsep) if p]
    return [*([data_root] if data_root else []), *listed, Path("data")]


def anywhere(name: str) -> str:
    """What means the same from any folder: a path that is there whole, names and references as they are.

    Links stay, as they are names, too; but what `..` leaves may be one.
    """
    if name.startswith("hf:") or name.partition(":")[0] == "shapes":
        return name
    path = Path(name).expanduser()
    if not exists(path):
        return name
    return str(path.resolve() if ".." in path.parts else path.absolute())


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a path, a NUL
        return False


def registers() -> list[Path]:
    """Files that name data sets: the project's, then the user's."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [Path("datasets.toml"), config / "detrcli" / "datasets.toml"]


def read_register(file: Path) -> dict[str, Any]:
    """The tables of a register by name; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: {error}", hint='it holds tables such as: [mine] path = "/data/mine"'
        ) from None


def names(data_root: Path | None = None) -> list[str]:
    """Every name that means a data set here."""
    found = list(BUILT_IN)
    for root in roots(data_root):
        found += sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    for file in registers():
        found += read_register(file)
    return list(dict.fromkeys(found))
