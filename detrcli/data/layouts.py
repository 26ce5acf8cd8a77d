"""Recognising what lies at a path: each layout answers with its splits, or with None where it is not one of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from detrcli.data.annotations import Dataset
from detrcli.data.formats import coco, huggingface, voc, yolo

SPLITS = ("train", "val", "test")
KNOWN = (
    "known layouts: annotations/instances_{train,val}.json with folders train, val of pictures (COCO); "
    "{train,valid}/_annotations.coco.json beside the pictures (Roboflow); data.yaml with images/ and labels/ (YOLO); "
    "Annotations/*.xml with JPEGImages/ (Pascal VOC)"
)
HEAD = 1 << 20  # bytes of a file by which it is recognised
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

    masks: bool = False  # outlines, too
    strict: bool = True  # refuse what falsifies training


Loader: TypeAlias = Callable[[Options], Dataset]


@dataclass(frozen=True, slots=True)
class Found:
    format: str
    splits: Mapping[str, Loader]


def split_name(text: str) -> str:
    """`valid`, `train2017` and kin in our three words; other names stay."""
    word = text.lower().removesuffix("2017").removesuffix("2014").rstrip("_-")
    return _ALIASES.get(word, word)


def at(path: Path, name: str) -> Found | None:
    """The first layout that fits."""
    if path.is_file():
        kinds = {".json": _coco_file, ".yaml": _yolo, ".yml": _yolo}
        return kinds[path.suffix](path, name) if path.suffix in kinds else None
    for recognise in (_coco_folder, _roboflow, _yolo_folder, _voc):
        found = recognise(path, name)
        if found is not None:
            return found
    return None


def coco_loader(path: Path, images: Path, name: str, split: str) -> Loader:
    return lambda options: coco.load_coco(path, images, name=name, split=split, masks=options.masks)


def _coco_file(path: Path, name: str) -> Found:
    """A single JSON: its pictures lie in the folder of its split, or beside it."""
    written = path.stem.removeprefix("instances_")
    split = split_name(written) if split_name(written) in SPLITS else "train"
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    images = _picture_folder(root, written, split) or path.parent
    return Found("coco", {split: coco_loader(path, images, name, split)})


def coco_files(root: Path) -> list[Path]:
    """Annotations in a folder that is none of the layouts, by their looks."""
    found = (path for folder in (root, root / "annotations") for path in sorted(folder.glob("*.json")))
    return [path for path in found if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return any(key in head for key in (b'"images"', b'"annotations"', b'"categories"'))


def _coco_folder(root: Path, name: str) -> Found | None:
    """annotations/instances_<split>.json and the folders <split> or images/<split>. Of a split that is there more than once
    (2014, 2017), the first with pictures; where its folder is missing, it is a split whose pictures are."""
    splits: dict[str, Loader] = {}
    without: dict[str, Loader] = {}
    for path in sorted((root / "annotations").glob("instances_*.json")):
        written = path.stem.removeprefix("instances_")
        split = split_name(written)
        images = _picture_folder(root, written, split)
        if images is not None:
            splits.setdefault(split, coco_loader(path, images, name, split))
        else:
            without[split] = coco_loader(path, root / written, name, split)
    found = without | splits
    return Found("coco", found) if found else None


def _picture_folder(root: Path, *names: str) -> Path | None:
    places = [place / name for name in names for place in (root, root / "images")]
    return next((place for place in [*places, root / "images"] if place.is_dir()), None)


def _roboflow(root: Path, name: str) -> Found | None:
    """<split>/_annotations.coco.json beside the pictures."""
    splits = {
        split_name(path.parent.name): coco_loader(path, path.parent, name, split_name(path.parent.name))
        for path in sorted(root.glob("*/_annotations.coco.json"))
    }
    return Found("roboflow-coco", splits) if splits else None


def _yolo_folder(root: Path, name: str) -> Found | None:
    path = next((root / file for file in ("data.yaml", "data.yml") if (root / file).is_file()), None)
    return _yolo(path, name) if path is not None else None


def _yolo(path: Path, name: str) -> Found:
    spec = yolo.read_spec(path)

    def loader(key: str) -> Loader:
        return lambda options: yolo.load_yolo(
            spec, key, name=name, split=split_name(key), masks=options.masks
        )

    return Found("yolo", {split_name(key): loader(key) for key in spec.splits})


def _voc(root: Path, name: str) -> Found | None:
    layout = voc.find_layout(root)
    if layout is None:
        return None

    def loader(key: str) -> Loader:
        return lambda options: voc.load_voc(
            layout, key, name=name, split=split_name(key), masks=options.masks
        )

    return Found("voc", {split_name(key): loader(key) for key in layout.pairs})


def hub(name: str) -> Found:
    """`hf:owner/name`."""
    tables = huggingface.open_hub(name.removeprefix("hf:"))

    def loader(key: str) -> Loader:
        return lambda options: huggingface.load_rows(
            tables, key, name=name, split=split_name(key), masks=options.masks
        )

    return Found("huggingface", {split_name(key): loader(key) for key in tables})
