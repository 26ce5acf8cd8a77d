"""Looking for what would spoil training or evaluation, in the pictures too: what `detr data check` does.

pictures(dataset)        every picture opened, decoded and hashed
check(source)            that and the structure for all splits, and pictures that stand in two of them
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from detrcli.data.annotations import Dataset
from detrcli.data.catalog import Source
from detrcli.data.defects import Defects
from detrcli.data.formats.files import Files
from detrcli.data.images import decode, open_image, orientation, shown_size
from detrcli.data.layouts import Options
from detrcli.data.structure import repair
from detrcli.errors import DataError, ImageError

_USUAL = ("RGB", "L")


@dataclass(slots=True)
class Seen:
    """What the pictures of a split showed."""

    defects: Defects = field(default_factory=Defects)
    digests: dict[str, str] = field(default_factory=dict)  # file name -> hash of its bytes
    bad: set[str] = field(default_factory=set)  # names that cannot be used
    twins: dict[str, str] = field(default_factory=dict)  # hash -> the first name that has it


def pictures(dataset: Dataset, *, fast: bool = False, advance: Callable[[], None] = lambda: None) -> Seen:
    """Every picture's file: there, decodable, of the annotated size; `fast` reads headers only.

    A truncated JPEG shows only when it is decoded to the end, so the thorough way costs what an epoch of loading costs.
    """
    seen = Seen()
    source = dataset.pictures
    if not isinstance(source, Files):
        return seen
    sizes = [(int(h), int(w)) for h, w in dataset.annotations.sizes]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = pool.map(lambda n, s: _look(source, n, s, fast), dataset.annotations.names, sizes)
        for name, (digest, found) in zip(dataset.annotations.names, jobs, strict=True):
            advance()
            _record(seen, name, digest, found)
    return seen


def _record(seen: Seen, name: str, digest: str, found: list[tuple[str, str]]) -> None:
    for kind, detail in found:
        seen.defects.add(kind, name, "", detail)
        if kind in ("missing-file", "unreadable-image", "size-differs"):
            seen.bad.add(name)
    if not digest or name in seen.digests:
        return
    twin = seen.twins.setdefault(digest, name)
    if twin != name:
        seen.defects.add("same-image", name, "", f"as {twin}")
    seen.digests[name] = digest


def _look(source: Files, name: str, size: tuple[int, int], fast: bool) -> tuple[str, list[tuple[str, str]]]:
    """The hash of one file and what is wrong with it."""
    try:
        data = source.file(0, name).read_bytes()
    except DataError as error:
        return "", [("missing-file", error.message)]
    except OSError as error:
        return "", [("missing-file", (error.strerror or str(error)).lower())]
    try:
        return hashlib.sha256(data).hexdigest(), list(_inspect(data, name, size, fast))
    except ImageError as error:
        return "", [("unreadable-image", error.message.removeprefix(f"{name}: "))]


def _inspect(data: bytes, name: str, size: tuple[int, int], fast: bool) -> Iterator[tuple[str, str]]:
    picture = open_image(data, name)
    turn, shown = orientation(picture), shown_size(picture)
    stored = (picture.height, picture.width)
    if picture.mode not in _USUAL:
        yield "unusual-mode", picture.mode
    if turn != 1:
        yield "exif-rotated", f"orientation {turn}"
    if 0 not in size and size not in (shown, stored):
        wrong = f"{stored[1]} x {stored[0]}, annotated as {size[1]} x {size[0]}"
        yield "size-differs", wrong
    elif not fast:
        decode(data, name=name)


def leaks(digests: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """By split, the pictures that another split has, too; train gives way to val, and val to test."""
    owner: dict[str, tuple[str, str]] = {}
    found: dict[str, dict[str, str]] = {}
    for split in sorted(digests, key=lambda split: {"test": 0, "val": 1, "train": 3}.get(split, 2)):
        for name, digest in digests[split].items():
            where = owner.setdefault(digest, (split, name))
            if where[0] != split:
                found.setdefault(split, {})[name] = "/".join(where)
    return found


@dataclass(slots=True)
class Report:
    """What a check of a whole data set found."""

    source: Source
    datasets: dict[str, Dataset] = field(default_factory=dict)
    defects: dict[str, Defects] = field(default_factory=dict)  # by split
    bad: dict[str, set[str]] = field(default_factory=dict)  # names of unusable pictures, by split

    @property
    def errors(self) -> int:
        return sum(defects.errors for defects in self.defects.values())

    def repaired(self) -> dict[str, Dataset]:
        return {split: repair(dataset, self.bad[split]) for split, dataset in self.datasets.items()}

    def to_json(self) -> dict[str, Any]:
        splits = {
            split: {
                "images": len(dataset),
                "objects": len(dataset.annotations.ids),
                "defects": self.defects[split].to_json(),
            }
            for split, dataset in self.datasets.items()
        }
        return {
            "data": self.source.name,
            "format": self.source.format,
            "errors": self.errors,
            "splits": splits,
        }


def check(source: Source, *, fast: bool = False, advance: Callable[[], None] = lambda: None) -> Report:
    """All splits, all defects; `fast` reads the pictures' headers only."""
    report, digests = Report(source), {}
    for split in source.splits:
        dataset = source.load(split, Options(strict=False))
        seen = pictures(dataset, fast=fast, advance=advance)
        dataset.defects.merge(seen.defects)
        report.datasets[split], report.defects[split], report.bad[split] = dataset, dataset.defects, seen.bad
        digests[split] = seen.digests
    for split, found in leaks(digests).items():
        for name, other in found.items():
            report.defects[split].add("leak", name, "", f"as {other}")
            report.bad[split].add(name)
    return report
