"""From what the user typed to a `Dataset`: built-in names, registered names, paths, the Hub.

    shapes, shapes:hard          synthetic, drawn from a seed
    coco, my_data                a folder of that name under --data-root or a folder of DETR_DATA, or a table in
                                 ./datasets.toml or ~/.config/detrcli/datasets.toml
    ./folder, x.json, x.yaml     a path; its format is recognised
    hf:owner/name                a data set on the Hugging Face Hub

A name is never taken for a path of the same spelling further away: what exists as a path wins, then the roots in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from detrcli import distributed
from detrcli.data import layouts, shapes
from detrcli.data.annotations import Dataset
from detrcli.data.layouts import SPLITS, Loader, Options, split_name
from detrcli.data.places import exists, names, read_register, registers, roots
from detrcli.data.structure import broken_files, missing_files, repair, structure
from detrcli.errors import DataError, UsageError, nearest, typed

BadData: TypeAlias = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that was found: its splits, not loaded yet."""

    name: str
    format: str
    splits: Mapping[str, Loader]
    root: Path | None = None  # the --data-root that it lies in

    @property
    def asked(self) -> str:
        """As it is typed."""
        return typed(self.name, *(("--data-root", self.root) if self.root else ()))

    def load(self, split: str, options: Options = Options()) -> Dataset:
        """One split, with what its arrays show in `defects`."""
        dataset = self.read(split, options)
        dataset.defects.merge(structure(dataset))
        return dataset

    def read(self, split: str, options: Options) -> Dataset:
        """One split, with what its reader found in `defects`."""
        wanted = split_name(split)
        if wanted not in self.splits:
            raise DataError(
                f"{self.name} has no split {split!r}, only {', '.join(self.splits)}",
                hint=self._way_to(wanted),
            )
        dataset = replace(self.splits[wanted](options), asked=self.asked)
        if options.strict:
            dataset.refuse()
        return dataset

    def _way_to(self, split: str) -> str:
        have = next(iter(self.splits))
        if split not in ("train", "val", "test"):
            return f"name one of these: --split {have}"
        options = " --test 0.1" * (split == "test") + f" --from {have}" * (have != "train")
        return f"make one: detr data split {self.asked} OUT{options}"


def resolve(
    name: str,
    split: str,
    data_root: Path | None = None,
    *,
    masks: bool = False,
    bad_data: BadData = "error",
    headers: bool = False,
) -> Dataset:
    """One split of the data set that `name` means, checked as far as that costs seconds; with `headers` those of its pictures,
    too.

    Defects that falsify training or evaluation are refused, or with `bad_data="skip"` left out; what was found is in
    `defects` either way.
    """
    skip = bad_data == "skip"
    dataset = find(name, data_root).load(split, Options(masks=masks, strict=not skip))
    bad = set[str]()
    for file, detail in missing_files(dataset).items():
        dataset.defects.add("missing-file", file, "", detail)
        bad.add(file)
    dataset.refuse(skip=skip)
    if headers:
        broken = distributed.from_main(broken_files(dataset, bad) if distributed.is_main() else {})
        for file, (kind, detail) in broken.items():
            dataset.defects.add(kind, file, "", detail)
            bad.add(file)
        dataset.refuse(skip=skip)
    if not skip:
        return dataset
    found = dataset.defects
    dataset = repair(dataset, bad)
    dataset.defects.merge(found)
    return dataset


def find(name: str, data_root: Path | None = None) -> Source:
    """What `name` means; its files are recognised, not read."""
    if name == "shapes" or name.startswith("shapes:"):
        return _shapes(name)
    if name.startswith("hf:"):
        return _source(name, layouts.hub(name))
    path = Path(name).expanduser()
    if exists(path):
        return recognise(path, name)
    if "/" in name or os.sep in name:
        raise _no_such(path, name)
    places = [root / name for root in roots(data_root)]
    for place in places:
        if exists(place):
            return replace(recognise(place, name), root=data_root if place is places[0] else None)
    for file in registers():
        if name in (table := read_register(file)):
            return _registered(name, table[name], file)
    if path.suffix in (".json", ".yaml", ".yml"):
        raise _no_such(path, name)
    raise _unknown(name, [*places, *registers()], data_root)


def recognise(path: Path, name: str) -> Source:
    """The data set at an existing path."""
    found = layouts.at(path, name)
    if found is None:
        files = layouts.coco_files(path)[:3]
        name_it = f"name the annotation file itself: {' or '.join(map(typed, files))}; " if files else ""
        raise DataError(f"{path}: no data set that detr can read", hint=name_it + layouts.KNOWN)
    return _source(name, found)


def _source(name: str, found: layouts.Found) -> Source:
    splits = found.splits
    ordered = [*(s for s in SPLITS if s in splits), *(s for s in splits if s not in SPLITS)]
    return Source(name, found.format, {split: splits[split] for split in ordered})


def _shapes(name: str) -> Source:
    preset = name.partition(":")[2] or "easy"
    shapes.preset_named(preset)

    def loader(split: str) -> Loader:
        return lambda options: shapes.load_shapes(preset, split, masks=options.masks)

    return Source(name, "shapes", {split: loader(split) for split in SPLITS})


def _registered(name: str, table: Any, file: Path) -> Source:
    """`[mine] path = "…"`, or for each split `train = {annotations = "….json", images = "…"}`."""
    if isinstance(table, dict) and isinstance(table.get("path"), str) and len(table) == 1:
        place = file.parent / Path(table["path"]).expanduser()
        if not place.exists():
            raise DataError(f"{file}: [{name}] path {place} is not there")
        return recognise(place, name)
    splits: dict[str, Loader] = {}
    for split, entry in table.items() if isinstance(table, dict) else ():
        if not isinstance(entry, dict) or set(entry) != {"annotations", "images"}:
            raise _not_understood(name, file)
        places = [file.parent / Path(str(entry[key])).expanduser() for key in ("annotations", "images")]
        splits[split_name(split)] = layouts.coco_loader(places[0], places[1], name, split_name(split))
    if not splits:
        raise _not_understood(name, file)
    return _source(name, layouts.Found("coco", splits))


def _not_understood(name: str, file: Path) -> DataError:
    hint = 'write path = "FOLDER", or for each split: train = {annotations = "FILE.json", images = "FOLDER"}'
    return DataError(f"{file}: [{name}] is not understood", hint=hint)


def _unknown(name: str, places: list[Path], data_root: Path | None) -> DataError | UsageError:
    looked = ", ".join(str(place) for place in places)
    if name == "coco":
        return DataError(
            f"coco is not on this machine (looked in {looked})",
            hint="expected: coco/annotations/instances_{train,val}2017.json, coco/train2017/, coco/val2017/; from "
            "http://images.cocodataset.org fetch zips/train2017.zip, zips/val2017.zip and "
            "annotations/annotations_trainval2017.zip, unpack them there, or say --data-root FOLDER",
        )
    near = nearest(name, names(data_root))
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UsageError(
        f"unknown data set {name!r} (looked in {looked})",
        hint=meant
        + "give a path, --data-root FOLDER, set DETR_DATA, or name it in datasets.toml; built in: shapes",
    )


def _no_such(path: Path, name: str) -> UsageError:
    return UsageError(f"no such file or folder: {name}", hint=_similar_paths(path))


def _similar_paths(path: Path) -> str | None:
    if not exists(path.parent):
        return f"there is no folder {path.parent}"
    near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else []
    return f"did you mean {' or '.join(typed(path.parent / n) for n in near)}?" if near else None
