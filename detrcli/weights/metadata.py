"""What travels inside a weights file beside its tensors: which model, which classes, which pictures it wants. Free of torch.

A safetensors file opens with eight bytes (the length of a JSON header, little endian) and the header; texts about the whole
file stand in it under `__metadata__`. Ours is one JSON document under the key `detrcli`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from detrcli.config import from_plain, to_plain
from detrcli.errors import CheckpointError, UsageError
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories

KEY = "detrcli"
SHARD_INDEX = ".safetensors.index.json"
SCHEMA = 1
MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Everything that is needed to use the tensors again."""

    model: str  # family/variant
    num_classes: int
    config: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the family's configuration type, plain values
    preprocess: Preprocess = field(default_factory=Preprocess)
    categories: Categories | None = None
    made: Mapping[str, Any] = field(default_factory=dict)  # how: command, data, metrics, source; for people
    aliases: Mapping[str, str] = field(default_factory=dict)  # second names of tensors that are stored once
    sha256: str = ""  # over the tensors and all of the above; written by `save`
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema > SCHEMA:
            raise ValueError(f"schema {self.schema} is newer than this detrcli reads ({SCHEMA})")

    def dumps(self) -> str:
        return json.dumps(to_plain(self), ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    def unsigned(self) -> str:
        """The document that the hash covers."""
        return replace(self, sha256="").dumps()


def sniff(path: Path) -> str:
    """What a file is by its first bytes: "safetensors", "pickle", or words for the user."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise cannot_read(path, error) from error
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, the file itself was not fetched"
    # First the format whose opening bytes are a length, which may look like anything: 0x80, "PK", …
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if start[257:262] == b"ustar" or start[:1] == b"\x80" or start[:2] == b"PK":
        return "pickle"
    return "it starts like neither safetensors nor a PyTorch file"


def parse(text: str, path: Path) -> Metadata:
    try:
        return from_plain(Metadata, json.loads(text))
    except (ValueError, RecursionError, AttributeError, UsageError) as error:
        raise CheckpointError(
            f"{path}: the description inside the file cannot be read: {error}",
            hint="the file is damaged, or was written by a newer detrcli",
        ) from error


def read_metadata(path: Path) -> Metadata | None:
    """What a weights file says about itself, without reading its tensors; None for a foreign one."""
    text = read_header(path).get("__metadata__", {}).get(KEY)
    return parse(text, path) if isinstance(text, str) else None


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file; an error when there is none."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = json.loads(file.read(length)) if 0 < length <= MAX_HEADER else None
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its header cannot be read") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise damaged(path, "it has no header")
    return header


def shard_names(index: Path) -> list[str]:
    """The files that an index names; names that lead out of its folder are refused."""
    try:
        table = json.loads(index.read_text())["weight_map"]
        names = sorted(set(table.values()))
    except OSError as error:
        raise cannot_read(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, "its list of parts cannot be read") from error
    for name in names:
        if (
            not isinstance(name, str)
            or PurePosixPath(name).name != name
            or "\\" in name
            or name in ("", "..")
        ):
            raise damaged(index, f"it names a part outside its folder: {name!r}")
    return names


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    hint = "check the path" if isinstance(error, FileNotFoundError) else None
    return CheckpointError(f"cannot read {path}: {error.strerror or error}", hint=hint)


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a usable safetensors file: {why}",
        hint="copy or download it again; `last.safetensors` of the run may be whole",
    )
