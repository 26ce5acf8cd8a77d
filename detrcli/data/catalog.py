"""From what the user typed to a `Dataset`: built-in names, registered names, paths.

shapes, shapes:hard          synthetic, drawn from a seed
coco, my_data                a folder of that name under --data-root or a folder of DETR_DATA
./folder, file.json          a path; its format is recognised
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from detrcli.data import shapes
from detrcli.data.annotations import Dataset
from detrcli.data.formats import coco
from detrcli.errors import DataError, UsageError, nearest

SPLITS = ("train", "val", "test")
_ALIASES = {
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "training": "train",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How to load, whatever the format."""

    masks: bool = False
    strict: bool = True


Load: TypeAlias = Callable[[Options], Dataset]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that was found: its splits, not loaded yet."""

    name: str
    format: str
    splits: Mapping[str, Load]

    def load(self, split: str, options: Options = Options()) -> Dataset:
        wanted = split_name(split)
        if wanted not in self.splits:
            raise DataError(
                f"{self.name} has no split {split!r}, only {', '.join(self.splits)}",
                hint=f"make one: detr data split {self.name} --out OUT",
            )
        return self.splits[wanted](options)


def resolve(name: str, split: str, data_root: Path | None = None, *, masks: bool = False) -> Dataset:
    """One split of the data set that `name` means."""
    return find(name, data_root).load(split, Options(masks=masks))


def split_name(text: str) -> str:
    """`valid`, `train2017` and kin in our three words; other names stay."""
    word = text.lower().removesuffix("2017").removesuffix("2014").rstrip("_-")
    return _ALIASES.get(word, word)


def find(name: str, data_root: Path | None = None) -> Source:
    """What `name` means: a built-in, an existing path, or a folder under one of the roots."""
    if name == "shapes" or name.startswith("shapes:"):
        return _shapes(name)
    path = Path(name).expanduser()
    if path.exists():
        return recognise(path, name)
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"no such file or folder: {name}", hint=_similar_paths(path))
    places = [root / name for root in roots(data_root)]
    for place in places:
        if place.is_dir():
            return recognise(place, name)
    raise _unknown(name, places)


def roots(data_root: Path | None = None) -> list[Path]:
    """Where names are looked up: --data-root, the folders of DETR_DATA, `./data`."""
    listed = [Path(p).expanduser() for p in os.environ.get("DETR_DATA", "").split(os.pathsep) if p]
    return [*([data_root] if data_root else []), *listed, Path("data")]


def recognise(path: Path, name: str) -> Source:
    """The data set at an existing path."""
    if path.is_file() and path.suffix == ".json":
        return _coco_file(path, name)
    found = _coco_folder(path, name) or _split_folders(path, name) if path.is_dir() else None
    if found is None:
        raise DataError(f"{path}: no data set that detr can read", hint=_LAYOUTS)
    return found


_LAYOUTS = (
    "known layouts: annotations/instances_{train,val}.json with folders train, val of pictures (COCO); "
    "{train,valid}/_annotations.coco.json beside the pictures (Roboflow)"
)


def _shapes(name: str) -> Source:
    preset = name.partition(":")[2] or "easy"

    def loader(split: str) -> Load:
        return lambda options: shapes.load_shapes(preset, split)

    return Source(name, "shapes", {split: loader(split) for split in SPLITS})


def _coco_loader(path: Path, images: Path, name: str, split: str) -> Load:
    return lambda options: coco.load_coco(
        path, images, name=name, split=split, masks=options.masks, strict=options.strict
    )


def _coco_file(path: Path, name: str) -> Source:
    """A single JSON: its pictures lie in the folder of the split, or beside it."""
    split = split_name(path.stem.removeprefix("instances_").removeprefix("_annotations."))
    split = split if split in SPLITS else "train"
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    images = _picture_folder(root, path.stem.removeprefix("instances_"), split) or path.parent
    return Source(name, "coco", {s: _coco_loader(path, images, name, s) for s in (split,)})


def _coco_folder(root: Path, name: str) -> Source | None:
    """annotations/instances_<split>.json and the folders <split> or images/<split>."""
    splits: dict[str, Load] = {}
    for path in sorted((root / "annotations").glob("instances_*.json")):
        written = path.stem.removeprefix("instances_")
        images = _picture_folder(root, written, split_name(written))
        if images is not None:
            splits.setdefault(split_name(written), _coco_loader(path, images, name, split_name(written)))
    return Source(name, "coco", _in_order(splits)) if splits else None


def _split_folders(root: Path, name: str) -> Source | None:
    """<split>/_annotations.coco.json beside the pictures, as Roboflow exports."""
    splits = {
        split_name(path.parent.name): _coco_loader(path, path.parent, name, split_name(path.parent.name))
        for path in sorted(root.glob("*/_annotations.coco.json"))
    }
    return Source(name, "roboflow-coco", _in_order(splits)) if splits else None


def _picture_folder(root: Path, *names: str) -> Path | None:
    for name in names:
        for place in (root / name, root / "images" / name):
            if place.is_dir():
                return place
    return root / "images" if (root / "images").is_dir() else None


def _in_order(splits: dict[str, Load]) -> dict[str, Load]:
    known = [s for s in SPLITS if s in splits]
    return {s: splits[s] for s in [*known, *(s for s in splits if s not in SPLITS)]}


def _unknown(name: str, places: list[Path]) -> DataError | UsageError:
    looked = ", ".join(str(place) for place in places)
    if name == "coco":
        return DataError(
            f"coco is not on this machine (looked in {looked})",
            hint="expected: coco/annotations/instances_{train,val}2017.json, coco/train2017/, coco/val2017/; from "
            "http://images.cocodataset.org fetch zips/train2017.zip, zips/val2017.zip and "
            "annotations/annotations_trainval2017.zip, unpack them there, or say --data-root FOLDER",
        )
    near = nearest(name, ["coco", "shapes", *_folders(places)])
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UsageError(
        f"unknown data set {name!r} (looked in {looked})",
        hint=meant + "built in: shapes; else give a path, --data-root FOLDER, or set DETR_DATA",
    )


def _folders(places: list[Path]) -> list[str]:
    return [p.name for place in places if place.parent.is_dir() for p in place.parent.iterdir() if p.is_dir()]


def _similar_paths(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    near = nearest(path.name, (p.name for p in path.parent.iterdir()))
    return f"did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else None
