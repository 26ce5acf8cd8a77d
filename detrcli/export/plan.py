"""What is to be exported and how; whatever can be refused without building a model is refused here. Free of torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast, get_args

from detrcli.errors import DetrError, ModelError, UsageError, typed, unknown
from detrcli.export.description import SUFFIXES, Axis, Format
from detrcli.plugins.registry import Model

Needs = dict[Format, tuple[str, ...]]

RUNS: Needs = {"onnx": ("onnxruntime",), "pt2": (), "openvino": ("openvino",)}  # a file
NEEDS: Needs = {  # to make one: what converts it, and what runs it to verify it; the extra has the format's name
    "onnx": ("onnx", "onnxscript", *RUNS["onnx"]),
    "pt2": (),
    "openvino": ("onnx", "onnxscript", *RUNS["openvino"]),
}
LEAST = 32  # pixels a side
Sampling = Literal["gridsample", "gather"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How a model is exported; checked when made."""

    format: Format
    dynamic: tuple[Axis, ...] = ("batch", "size")
    size: tuple[int, int] | None = None  # height and width of every picture; None where the size is dynamic
    half: bool = False
    postprocess: bool = False
    preprocess: bool = False
    msda: Sampling = "gridsample"

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise unknown("format", self.format, get_args(Format))
        if self.msda not in get_args(Sampling):
            raise unknown("form of deformable attention", self.msda, get_args(Sampling))
        for axis in self.dynamic:
            if axis not in get_args(Axis):
                raise unknown("dynamic axis", axis, (*get_args(Axis), "none"))
        if "size" not in self.dynamic and self.size is None:
            raise UsageError(
                "a file for pictures of one size needs that size",
                hint="add --size HEIGHTxWIDTH, for example --size 800x1216",
            )
        if "size" in self.dynamic and self.size is not None:
            raise UsageError(
                "pictures are of one size or of any, not both",
                hint="leave size out of --dynamic, or leave --size out",
            )
        if self.size is not None and min(self.size) < LEAST:
            raise UsageError(
                f"pictures of {self.size[0]}x{self.size[1]} are too small", hint=f"at least {LEAST} a side"
            )


def dynamic_for(size: tuple[int, int] | None) -> tuple[Axis, ...]:
    """The axes that vary where nobody says: all that are not fixed."""
    return ("batch", "size") if size is None else ("batch",)


def parse_dynamic(text: str | None) -> tuple[Axis, ...] | None:
    """`batch,size` as axes; `none` for a file without any; None where nobody says."""
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if "none" in words and len(words) > 1:
        raise UsageError(
            f"--dynamic {text} says that something varies and that nothing does",
            hint="leave none out, or say nothing but none",
        )
    return () if words == ["none"] else cast(tuple[Axis, ...], tuple(words))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`800x1216` as height and width; one number is a square."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"a size is HEIGHTxWIDTH (value given: {text!r})", hint="for example: 800x1216")
    return int(parts[0]), int(parts[-1])


def format_of(out: Path | None) -> Format:
    """What a file's name says, ONNX without one."""
    if out is None:
        return "onnx"
    if out.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UsageError(f"what kind of file is {out}?", hint=f"a name that ends in {known}, or --format")
    return SUFFIXES[out.suffix.lower()]


def suffix_of(format: Format) -> str:
    return next(suffix for suffix, name in SUFFIXES.items() if name == format)


def check_model(model: Model) -> None:
    """An error where the model's own plugin says that no file can hold it."""
    if model.family.cannot_export:
        raise ModelError(
            f"{model.name} cannot be exported: {model.family.cannot_export}",
            hint="run it with detr predict and detr eval",
        )


def check_software(format: Format, needs: Needs = NEEDS) -> None:
    """An error that names the extra, where something that the format needs is not installed."""
    missing = [name for name in needs[format] if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{format} needs software that is not installed: {', '.join(missing)}",
            hint=f"pip install 'detrcli[{format}]'",
        )


def report_file(out: Path) -> Path:
    """The report's place, beside the file it is about."""
    return out.with_name(out.name + ".json")


def failed_report_file(out: Path) -> Path:
    """The place of a report on a file that did not get its name; `out` may be an older one, with a report of its own."""
    return out.with_name(out.name + ".failed.json")


def places(out: Path, format: Format) -> list[Path]:
    """All that may be written."""
    weights = [out.with_suffix(".bin")] if format == "openvino" else []
    return [out, *weights, report_file(out), failed_report_file(out)]


def check_place(out: Path, format: Format) -> None:
    """An error where the file could not be written, or its name says another format."""
    if SUFFIXES.get(out.suffix.lower()) != format:
        wanted = suffix_of(format)
        raise UsageError(
            f"a file of format {format} ends in {wanted} (name given: {out})",
            hint=typed("--out", out.with_suffix(wanted)),
        )
    if format == "openvino" and out.suffix != ".xml":
        raise UsageError(
            f"OpenVINO reads no file that ends in {out.suffix}", hint=typed("--out", out.with_suffix(".xml"))
        )
    for path in places(out, format):
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint="name another file with --out")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DetrError(f"cannot write {out}: no permission in {folder}", hint="choose another --out")
