"""Pascal VOC: one XML file a picture; pixel coordinates that begin at 1 and include the last pixel.

Two layouts: `Annotations/`, `JPEGImages/` and lists of names in `ImageSets/Main/`; or, as Roboflow exports, XML files
beside the pictures in `train/`, `valid/` and `test/`. An object marked difficult is neither learned nor scored, as the
challenge had it; in COCO's terms that is a crowd.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from detrcli.data.annotations import Builder, Dataset
from detrcli.data.defects import Defects
from detrcli.data.formats.files import SUFFIXES, Files, read_text, size_of
from detrcli.data.paths import inside, why_outside
from detrcli.errors import DataError
from detrcli.types import Categories

TRIED, HEAD = 20, 4096  # files of a folder, and bytes of each, by which it is recognised
CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """XML files and pictures below `root`: `pairs[split]` lists (XML, stem of the picture), relative to the root."""

    root: Path
    pairs: Mapping[str, tuple[tuple[str, str], ...]]


def find_layout(root: Path) -> Layout | None:
    """None where no XML file is of this kind: many programs write XML."""
    if (root / "Annotations").is_dir() and (
        (root / "JPEGImages").is_dir() or _has_pages(root / "Annotations")
    ):
        return Layout(root, dict(_listed(root)) or {"train": tuple(_classic(root))})
    pairs = {
        folder.name: tuple(
            (f"{folder.name}/{x.name}", f"{folder.name}/{x.stem}") for x in sorted(folder.glob("*.xml"))
        )
        for folder in sorted(root.iterdir())
        if folder.is_dir() and _has_pages(folder)
    }
    return Layout(root, pairs) if pairs else None


def _has_pages(folder: Path) -> bool:
    return any(map(_is_page, islice(sorted(folder.glob("*.xml")), TRIED)))


def _is_page(path: Path) -> bool:
    """Whether a file looks like one of these; what is wrong with it is told where it is read."""
    try:
        with path.open("rb") as file:
            return b"<annotation" in file.read(HEAD)
    except OSError:
        return False


def _classic(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "Annotations").glob("*.xml")):
        yield f"Annotations/{path.name}", f"JPEGImages/{path.stem}"


def _listed(root: Path) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """The splits of ImageSets/Main; its lists by class (`cat_train.txt`) are no splits."""
    for split in ("train", "val", "test"):
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            stems = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
            for stem in stems:
                if why_outside(stem):
                    raise DataError(f"{path}: {stem!r} refused, {why_outside(stem)}")
            yield split, tuple((f"Annotations/{stem}.xml", f"JPEGImages/{stem}") for stem in stems)


@dataclass(frozen=True, slots=True)
class Page:
    """One XML file."""

    filename: str
    size: tuple[int, int]  # height, width; zeros where it does not say
    objects: tuple[tuple[str, bool, tuple[float, ...]], ...]  # name, difficult, xmin ymin xmax ymax


def parse(text: str) -> Page:
    """A page, or ValueError with the reason."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares entities, which no annotation needs")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"not XML: {error}") from None
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag[:40]}>, not <annotation>")
    size = tuple(_length(root.findtext(f"size/{side}")) for side in ("height", "width"))
    objects = tuple(_object(node) for node in root.iterfind("object"))
    return Page(
        (root.findtext("filename") or "").strip(), (size[0], size[1]) if all(size) else (0, 0), objects
    )


def _length(text: str | None) -> int:
    try:
        value = float(text or 0)
    except ValueError:
        return 0
    return int(value) if 0 < value < 2**20 else 0


def _object(node: ElementTree.Element) -> tuple[str, bool, tuple[float, ...]]:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object without a name")
    try:
        corners = tuple(float(node.findtext(f"bndbox/{c}") or "") for c in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise ValueError(f"an object {name[:40]!r} without four numbers in its bndbox") from None
    return name, (node.findtext("difficult") or "").strip() == "1", corners


def categories_of(layout: Layout) -> Categories:
    """VOC's twenty if no other name occurs, else the names found, sorted; over all splits, so that they agree."""
    names = {
        found[0] for files in layout.pairs.values() for xml, _ in files for found in _objects(layout, xml)
    }
    ordered = CLASSES if names <= set(CLASSES) else sorted(names)
    return Categories(tuple(range(1, len(ordered) + 1)), tuple(ordered))


def _objects(layout: Layout, xml: str) -> tuple[tuple[str, bool, tuple[float, ...]], ...]:
    try:
        return parse(read_text(inside(layout.root, xml))).objects
    except (ValueError, DataError):  # reported when the split that it belongs to is read
        return ()


def load_voc(layout: Layout, key: str, *, name: str, split: str, masks: bool = False) -> Dataset:
    categories = categories_of(layout)
    reader = _Reader(layout, categories, Defects(), Builder(segments_wanted=masks))
    for number, (xml, stem) in enumerate(layout.pairs[key], 1):
        reader.page(number, xml, stem)
    if not reader.builder.images:
        reader.defects.add("no-images", str(layout.root), key)
    return Dataset(name, split, categories, reader.builder.build(), Files(layout.root), reader.defects)


@dataclass(slots=True)
class _Reader:
    layout: Layout
    categories: Categories
    defects: Defects
    builder: Builder

    def page(self, number: int, xml: str, stem: str) -> None:
        try:
            page = parse(read_text(inside(self.layout.root, xml)))
        except (ValueError, DataError) as error:
            self.defects.add("bad-xml", xml, "", str(error))
            return
        picture = self._picture(page, stem)
        if picture is None:
            self.defects.add("missing-file", xml, "", f"no picture {stem}.*")
            return
        size = page.size if all(page.size) else size_of(inside(self.layout.root, picture))
        image = self.builder.image(number, picture, *size)
        for place, (name, difficult, corners) in enumerate(page.objects, 1):
            self._add(image, f"object {place}", xml, name, difficult, corners)

    def _picture(self, page: Page, stem: str) -> str | None:
        """The file that is named like the page; else the one that it names."""
        folder = Path(stem).parent
        names = [f"{stem}{suffix}" for ending in SUFFIXES for suffix in (ending, ending.upper())]
        names.sort(key=lambda name: not name.endswith(".jpg"))  # nearly always
        if page.filename and why_outside(page.filename) is None:
            names.insert(1, (folder / page.filename).as_posix())
        return next((name for name in names if inside(self.layout.root, name).is_file()), None)

    def _add(
        self, image: int, where: str, file: str, name: str, difficult: bool, corners: tuple[float, ...]
    ) -> None:
        if not all(map(math.isfinite, corners)):
            self.defects.add("non-finite-box", file, where, str(corners))
            return
        x1, y1, x2, y2 = corners
        box = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
        label = self.categories.label_named(name)
        self.builder.add(image, len(self.builder.rows) + 1, label, box, crowd=difficult)
