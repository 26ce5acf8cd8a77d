"""Writing data sets: as a COCO folder or a YOLO folder, whole or not at all, with the pictures as they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from detrcli.data.annotations import Dataset
from detrcli.data.classes import united
from detrcli.data.formats.yolo import label_file
from detrcli.data.paths import inside
from detrcli.errors import DataError, UsageError
from detrcli.files import cannot_write


def write_coco(splits: Mapping[str, Dataset], out: Path) -> None:
    """annotations/instances_<split>.json and the pictures in <split>/."""
    with _new_folder(out) as folder:
        (folder / "annotations").mkdir()
        for split, dataset in splits.items():
            names = _short_names(dataset)
            document = dataset.to_coco()
            for row, name in zip(document["images"], names, strict=True):
                row["file_name"] = name
            path = folder / "annotations" / f"instances_{split}.json"
            text = json.dumps(document, ensure_ascii=False)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's way, too
            _copy_pictures(dataset, names, folder / split)


def write_yolo(splits: Mapping[str, Dataset], out: Path) -> None:
    """images/<split>/, labels/<split>/ and data.yaml. Crowds and ids have no place in this format, and the splits share one
    list of classes."""
    splits = united(splits)
    with _new_folder(out) as folder:
        for split, dataset in splits.items():
            names = _short_names(dataset)
            _copy_pictures(dataset, names, folder / "images" / split)
            for index, name in enumerate(names):
                path = folder / label_file(f"images/{split}/{name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    raise DataError(
                        f"{name}: two pictures of one name would share the label file {path.name}"
                    )
                path.write_text("".join(_yolo_lines(dataset, index)), encoding="utf-8")
        classes = next(iter(splits.values())).categories.names
        lines = [f"{split}: images/{split}" for split in splits]
        lines += ["names:", *(f"  {label}: {json.dumps(name)}" for label, name in enumerate(classes))]
        (folder / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Mapping[str, Dataset], Path], None]] = {"coco": write_coco, "yolo": write_yolo}


def _yolo_lines(dataset: Dataset, index: int) -> Iterator[str]:
    objects = dataset.annotations.objects(index)
    height, width = dataset.annotations.sizes[index]
    if not height:
        height, width = dataset.picture(index).shape[1:]
    for label, (x, y, w, h) in zip(
        objects.labels[objects.trainable], objects.boxes[objects.trainable], strict=True
    ):
        left, right = np.clip([x, x + w], 0, width) / width
        top, bottom = np.clip([y, y + h], 0, height) / height
        if right > left and bottom > top:
            numbers = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            yield f"{label} " + " ".join(f"{value:.8g}" for value in numbers) + "\n"


def _short_names(dataset: Dataset) -> list[str]:
    """The file names without the folders that all of them share."""
    names = list(dataset.annotations.names)
    shared = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    return [os.path.relpath(name, shared) if shared else name for name in names]


def _copy_pictures(dataset: Dataset, names: list[str], folder: Path) -> None:
    """The files as they are; pictures that are no files are written without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        target = inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = dataset.file(index)
        if source is not None:
            if not source.is_file():
                raise DataError(
                    f"{source}: no such file, though the data set names it",
                    hint="see all that is missing: detr data check DATA",
                )
            shutil.copyfile(source, target)
        else:
            Image.fromarray(dataset.picture(index).permute(1, 2, 0).numpy()).save(target)


def check_new(out: Path) -> None:
    """An error where a data set would be written over something; also for those who need the place only after their work."""
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise cannot_write(out, error) from error
    if taken:
        raise UsageError(f"{out} exists and is not an empty folder", hint="choose a new folder")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete; one that is there keeps its place, where somebody may stand in it, and gets
    its content then."""
    check_new(out)
    there, suffix = out.exists(), f".partial-{os.getpid()}"
    partial = out / suffix if there else out.with_name(f".{out.name}{suffix}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if not there:
            partial.replace(out)
            return
        for path in sorted(partial.iterdir(), reverse=True):  # by which the data set is recognised, last
            path.replace(out / path.name)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
