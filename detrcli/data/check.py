"""Looking for what would spoil training or evaluation, in the pictures too: what `detr data check` does.

pictures(dataset)        every picture opened, decoded and hashed
check(source)            that and the structure for all splits, and pictures that stand in two of them
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from detrcli.data.annotations import Array, Dataset, Pictures
from detrcli.data.catalog import Source
from detrcli.data.classes import compared, united
from detrcli.data.defects import Defects
from detrcli.data.images import decode, open_image, orientation, shown_size
from detrcli.data.layouts import Options
from detrcli.data.structure import repair, structure
from detrcli.errors import DataError, ImageError

_USUAL = ("RGB", "L")


@dataclass(slots=True)
class Looked:
    """What one picture's file showed."""

    found: list[tuple[str, str]] = field(default_factory=list)  # kind of defect, detail
    digest: str = ""  # of its bytes; empty where it cannot be used
    size: tuple[int, int] = (0, 0)  # height and width as a viewer shows it


@dataclass(slots=True)
class Seen:
    """What the pictures of a split showed."""

    defects: Defects = field(default_factory=Defects)
    names: dict[str, list[str]] = field(default_factory=dict)  # digest -> the pictures that have it
    bad: set[str] = field(default_factory=set)  # names that cannot be used
    sizes: Array = field(default_factory=lambda: np.zeros((0, 2), np.int64))


def pictures(dataset: Dataset, *, fast: bool = False, advance: Callable[[], None] = lambda: None) -> Seen:
    """Every picture's file: there, decodable, of the annotated size; `fast` reads headers only.

    A truncated JPEG shows only when it is decoded to the end, so the thorough way costs what an epoch of loading costs.
    """
    seen, source = Seen(sizes=dataset.annotations.sizes.copy()), dataset.pictures
    annotated = [(int(h), int(w)) for h, w in dataset.annotations.sizes]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = pool.map(
            lambda i, n, s: _look(source, i, n, s, fast), count(), dataset.annotations.names, annotated
        )
        for index, (name, looked) in enumerate(zip(dataset.annotations.names, jobs, strict=True)):
            advance()
            if looked is None:  # drawn
                continue
            _record(seen, name, looked)
            if 0 in annotated[index]:
                seen.sizes[index] = looked.size
    return seen


def _record(seen: Seen, name: str, looked: Looked) -> None:
    for kind, detail in looked.found:
        seen.defects.add(kind, name, "", detail)
    if not looked.digest:
        seen.bad.add(name)
        return
    twins = seen.names.setdefault(looked.digest, [])
    if twins and name not in twins:
        seen.defects.add("same-image", name, "", f"as {twins[0]}")
    twins.append(name)


def _look(source: Pictures, index: int, name: str, size: tuple[int, int], fast: bool) -> Looked | None:
    looked = Looked()
    try:
        data = source.stored(index, name)
        if data is None:
            return None
        _inspect(data, name, size, looked)
        if not fast:
            decode(data, name=name)
        if not any(kind == "size-differs" for kind, _ in looked.found):
            looked.digest = hashlib.sha256(data).hexdigest()
    except ImageError as error:
        looked.found.append(("unreadable-image", error.message.removeprefix(f"{name}: ")))
    except DataError as error:
        looked.found.append(("missing-file", error.message))
    except OSError as error:
        looked.found.append(("missing-file", (error.strerror or str(error)).lower()))
    return looked


def _inspect(data: bytes, name: str, size: tuple[int, int], looked: Looked) -> None:
    """What the header says."""
    picture = open_image(data, name)
    turn, looked.size = orientation(picture), shown_size(picture)
    stored = (picture.height, picture.width)
    if picture.mode not in _USUAL:
        looked.found.append(("unusual-mode", picture.mode))
    if turn != 1:
        looked.found.append(("exif-rotated", f"orientation {turn}"))
    if 0 not in size and size not in (looked.size, stored):
        detail = f"{stored[1]} x {stored[0]}, annotated as {size[1]} x {size[0]}"
        looked.found.append(("size-differs", detail))


def leaks(names: Mapping[str, Mapping[str, list[str]]]) -> dict[str, dict[str, str]]:
    """By split, the pictures that another split has, too; train gives way to val, and val to test. `names` are the
    pictures of each split by digest."""
    owner: dict[str, tuple[str, str]] = {}
    found: dict[str, dict[str, str]] = {}
    for split in sorted(names, key=lambda split: {"test": 0, "val": 1, "train": 3}.get(split, 2)):
        for digest, twins in names[split].items():
            where = owner.setdefault(digest, (split, twins[0]))
            if where[0] != split:
                found.setdefault(split, {}).update(dict.fromkeys(twins, "/".join(where)))
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

    @property
    def emptied(self) -> list[str]:
        """The splits of which a copy would have no picture."""
        return [s for s, dataset in self.datasets.items() if not set(dataset.annotations.names) - self.bad[s]]

    @property
    def repairable(self) -> bool:
        """Whether a copy would be better."""
        return any(defects.repairable for defects in self.defects.values()) and not self.emptied

    def repaired(self) -> dict[str, Dataset]:
        return united({split: repair(dataset, self.bad[split]) for split, dataset in self.datasets.items()})

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
    report, names = Report(source), dict[str, Mapping[str, list[str]]]()
    for split in source.splits:
        dataset = source.read(split, Options(masks=True, strict=False))
        seen = pictures(dataset, fast=fast, advance=advance)
        sized = dataclasses.replace(dataset.annotations, sizes=seen.sizes)
        dataset = dataclasses.replace(dataset, annotations=sized)
        for found in (structure(dataset), seen.defects):
            dataset.defects.merge(found)
        report.datasets[split] = dataset
        report.defects[split], report.bad[split], names[split] = dataset.defects, seen.bad, seen.names
    if "train" in report.datasets:
        for split, dataset in report.datasets.items():
            report.defects[split].merge(compared(dataset, report.datasets["train"].categories))
    for split, shared in leaks(names).items():
        for name, other in shared.items():
            report.defects[split].add("leak", name, "", f"as {other}")
            report.bad[split].add(name)
    return report
