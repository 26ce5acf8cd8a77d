"""Results on disk, one writer a form; any set of them works side by side, each as results arrive.

image   annotated pictures          json    one document with everything
jsonl   one line a picture          coco    COCO results, with the images and categories they refer to
yolo    one text file a picture     csv     one row a detection          crops   each object cut out
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from PIL import Image

from detrcli.errors import unknown
from detrcli.files import writing
from detrcli.predict import draw
from detrcli.predict.result import Failure, Result
from detrcli.predict.run import stem_of
from detrcli.types import Categories

SCHEMA_VERSION = 1  # of the documents described by docs/schema/predict.schema.json
# Ids of COCO results from file names end here, others begin; floats hold both exactly.
END_OF_NUMBERS = 10**15


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run's files go, and what they say about the run."""

    folder: Path
    categories: Categories
    about: Mapping[str, Any] = field(default_factory=dict)  # model, weights, settings
    named: bool = False  # whether there are files called after each picture, which records must then tell


class Writer(Protocol):
    def write(self, result: Result, stem: str) -> None: ...

    def close(self, failures: list[Failure]) -> None: ...


class _Names:
    """Names for files that no two of a run share, on whatever system they lie."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.numbers: dict[str, int] = {}  # the last given to each name: many of one name take no search

    def unlike(self, first: str) -> str:
        """This name, with a number where it has been given out before."""
        number = self.numbers.get(first.casefold(), 0) + 1
        name = first if number == 1 else f"{first}-{number}"
        while name.casefold() in self.taken:
            number += 1
            name = f"{first}-{number}"
        self.numbers[first.casefold()] = number
        self.taken.add(name.casefold())
        return name


class Outputs:
    """All writers of a run as one; `where` they write, in words, and whether files are `named` after pictures."""

    def __init__(self, writers: list[Writer], where: str, *, named: bool = False) -> None:
        self.writers = writers
        self.where = where
        self.named = named
        self._names = _Names()

    @classmethod
    def in_folder(cls, target: Target, forms: list[str]) -> Outputs:
        where = f"in {target.folder}"
        with writing(where):
            target.folder.mkdir(parents=True, exist_ok=True)
            target = replace(target, named=not NAMED.isdisjoint(forms))
            return cls([FORMS[form](target) for form in dict.fromkeys(forms)], where, named=target.named)

    def write(self, result: Result) -> str | None:
        """What the picture's files are called, without their endings, where it has files of its own."""
        stem = self._names.unlike(stem_of(result.source))
        with writing(self.where):
            for writer in self.writers:
                writer.write(result, stem)
        return stem if self.named else None

    def close(self, failures: list[Failure]) -> None:
        """All of them, even where one cannot finish."""
        with writing(self.where), ExitStack() as stack:
            for writer in reversed(self.writers):
                stack.callback(writer.close, failures)


class _Images:
    def __init__(self, target: Target) -> None:
        self.folder = target.folder

    def write(self, result: Result, stem: str) -> None:
        jpeg = result.source.lower().endswith((".jpg", ".jpeg"))
        draw.save(result.draw(), self.folder / f"{stem}{'.jpg' if jpeg else '.png'}")

    def close(self, failures: list[Failure]) -> None:
        pass


class _Json:
    """One document, written as results come, so that it never stands in memory."""

    def __init__(self, target: Target) -> None:
        self.named = target.named
        self.file = (target.folder / "predictions.json").open("w", encoding="utf-8")
        head = _text({"schema_version": SCHEMA_VERSION, **target.about})
        self.file.write(f'{head[:-1]}, "images": [')
        self.separator = "\n"

    def write(self, result: Result, stem: str) -> None:
        self.file.write(self.separator + _text(record(result, stem if self.named else None)))
        self.separator = ",\n"
        self.file.flush()

    def close(self, failures: list[Failure]) -> None:
        with self.file:
            self.file.write(f'\n], "failures": {_text([failure.to_dict() for failure in failures])}}}\n')


class JsonLines:
    """One line a picture, as it finishes; failures last."""

    def __init__(self, file: TextIO, *, named: bool = False) -> None:
        self.file = file
        self.named = named

    def write(self, result: Result, stem: str = "") -> None:
        self._line(record(result, stem if self.named else None))

    def close(self, failures: list[Failure]) -> None:
        for failure in failures:
            self._line(failure.to_dict())

    def _line(self, fields: dict[str, Any]) -> None:
        self.file.write(_text({"schema_version": SCHEMA_VERSION, **fields}) + "\n")
        self.file.flush()


class _JsonLinesFile(JsonLines):
    def __init__(self, target: Target) -> None:
        file = (target.folder / "predictions.jsonl").open("w", encoding="utf-8")
        super().__init__(file, named=target.named)

    def close(self, failures: list[Failure]) -> None:
        with self.file:
            super().close(failures)


class _Coco:
    """`coco_results.json` for evaluators, and `coco_images.json`, which says what its ids mean. A file whose name is a number,
    as in COCO, keeps it as its id; ids of others are larger than any such number, for which may still come is not known."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.images: list[dict[str, Any]] = []
        self.taken: set[int] = set()
        self.file = (target.folder / "coco_results.json").open("w", encoding="utf-8")
        self.separator = "["

    def write(self, result: Result, stem: str) -> None:
        image_id = self._id(stem, result.index)
        size = {"width": result.width, "height": result.height}
        self.images.append({"id": image_id, "file_name": result.source, **size})
        for row in result.to_coco(image_id):
            self.file.write(self.separator + _text(row))
            self.separator = ",\n"
        self.file.flush()

    def _id(self, stem: str, index: int) -> int:
        number = int(stem) if stem.isascii() and stem.isdigit() else END_OF_NUMBERS
        if number < END_OF_NUMBERS and number not in self.taken:
            self.taken.add(number)
            return number
        return END_OF_NUMBERS + index

    def close(self, failures: list[Failure]) -> None:
        with self.file:
            self.file.write("]\n" if self.separator != "[" else "[]\n")
        names = zip(self.target.categories.ids, self.target.categories.names, strict=True)
        categories = [{"id": number, "name": name} for number, name in names]
        document = _text({"images": self.images, "categories": categories})
        (self.target.folder / "coco_images.json").write_text(document + "\n", encoding="utf-8")


class _Yolo:
    """Lines of class, centre, size (all relative to the picture) and score; classes counted from 0 as in classes.txt."""

    def __init__(self, target: Target) -> None:
        self.folder = target.folder / "labels"
        self.folder.mkdir(exist_ok=True)
        names = "".join(" ".join(name.split()) + "\n" for name in target.categories.names)
        (target.folder / "classes.txt").write_text(names, encoding="utf-8")

    def write(self, result: Result, stem: str) -> None:
        lines = []
        for found in result.detections:
            x1, y1, x2, y2 = found.box
            centre = ((x1 + x2) / 2 / result.width, (y1 + y2) / 2 / result.height)
            size = ((x2 - x1) / result.width, (y2 - y1) / result.height)
            numbers = " ".join(f"{value:.6f}" for value in (*centre, *size, found.score))
            lines.append(f"{found.label} {numbers}\n")
        (self.folder / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")

    def close(self, failures: list[Failure]) -> None:
        pass


class _Csv:
    COLUMNS = ("source", "width", "height", "category_id", "name", "score", "x1", "y1", "x2", "y2")

    def __init__(self, target: Target) -> None:
        self.file = (target.folder / "predictions.csv").open("w", encoding="utf-8", newline="")
        self.table = csv.writer(self.file)
        self.table.writerow(self.COLUMNS)

    def write(self, result: Result, stem: str) -> None:
        for found in result.detections:
            record = found.to_dict()
            about = (result.source, result.width, result.height, record["category_id"], record["name"])
            self.table.writerow((*about, record["score"], *record["box"]))
        self.file.flush()

    def close(self, failures: list[Failure]) -> None:
        self.file.close()


class _Crops:
    """Each object in a folder of its class, from the original pixels."""

    def __init__(self, target: Target) -> None:
        names = _Names()  # of folders: those of two classes may differ only in what a folder cannot be called
        self.folders = [target.folder / "crops" / names.unlike(_safe(n)) for n in target.categories.names]

    def write(self, result: Result, stem: str) -> None:
        for number, found in enumerate(result.detections, 1):
            x1, y1, x2, y2 = found.box
            left, top = int(x1), int(y1)
            right, bottom = max(left + 1, -int(-x2 // 1)), max(top + 1, -int(-y2 // 1))
            cut = result.pixels[:, top:bottom, left:right]
            if cut.numel():
                folder = self.folders[found.label]
                folder.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy())
                picture.save(folder / f"{stem}-{number}.png")

    def close(self, failures: list[Failure]) -> None:
        pass


FORMS: Mapping[str, Callable[[Target], Writer]] = {
    "image": _Images,
    "json": _Json,
    "jsonl": _JsonLinesFile,
    "coco": _Coco,
    "yolo": _Yolo,
    "csv": _Csv,
    "crops": _Crops,
}

NAMED = {"image", "yolo", "crops"}  # forms with files called after each picture


def check_forms(forms: Iterable[str]) -> None:
    """An error for a form that there is not."""
    for form in forms:
        if form not in FORMS:
            raise unknown("output format", form, FORMS)


def record(result: Result, stem: str | None) -> dict[str, Any]:
    """A picture in JSON, with what its files are called, where it has any."""
    fields = result.to_dict()
    return fields if stem is None else {"source": result.source, "stem": stem, **fields}


def _safe(name: str) -> str:
    """The whole of a class's name as that of a folder, which neither is one above nor ends as Windows forbids."""
    return stem_of(re.sub(r"[/\\]", "_", name) + ".").rstrip(". ") or "class"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
