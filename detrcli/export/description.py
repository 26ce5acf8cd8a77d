"""What an exported file says about itself: enough to run it without the weights it came from. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detrcli.config import from_plain, to_plain
from detrcli.errors import CheckpointError, UsageError
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories

KEY = "detrcli"  # of the JSON document among an ONNX file's or an OpenVINO model's own metadata
SCHEMA = 1

Format = Literal["onnx", "pt2", "openvino"]
Axis = Literal["batch", "size"]
SUFFIXES: Mapping[str, Format] = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Written into the file as JSON, under the names below."""

    model: str  # family/variant
    config: Mapping[str, Any]  # of the family's configuration type, plain values
    categories: Categories
    preprocess: Preprocess
    format: Format
    precision: Literal["float32", "float16"] = "float32"  # of the arithmetic; inputs and outputs are float32
    msda: Literal["gridsample", "gather"] = "gridsample"
    dynamic: tuple[Axis, ...] = ("batch", "size")
    size: tuple[int, int] | None = None  # height and width of every picture, where they are fixed
    values: Literal["normalised", "uint8"] = "normalised"  # what `images` holds
    postprocessed: bool = False  # scores, labels and boxes (xyxy) instead of logits and boxes (cxcywh)
    only_batch: int | None = None  # a batch size that the model insists on
    weights: str = ""  # which, in words
    weights_sha256: str = ""  # of the weights' file
    license: str = ""  # of the weights, where known
    made: Mapping[str, Any] = field(default_factory=dict)  # versions and time; for people
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema > SCHEMA:
            raise ValueError(f"schema {self.schema} is newer than this detrcli reads ({SCHEMA})")

    def dumps(self) -> str:
        return json.dumps(to_plain(self), ensure_ascii=False, sort_keys=True)


def parse(text: str | None, path: Path) -> Description:
    """The description found in a file; an error for a file without one."""
    if not text:
        raise CheckpointError(
            f"{path} was not made by detr export: it does not say its classes, its model and how pictures are prepared",
            hint="export the model again with `detr export`, or run the file with its own runtime",
        )
    try:
        return from_plain(Description, json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise CheckpointError(
            f"{path}: the description inside the file cannot be read: {error}",
            hint="the file is damaged, or was written by a newer detrcli",
        ) from error


def exported_file(model: str | None, weights: object = None) -> Path | None:
    """The path, where what stands for a model is the name of an exported file; that has weights of its own."""
    if isinstance(weights, str) and Path(weights).suffix.lower() in SUFFIXES:
        raise UsageError(f"{weights} is an exported model, not weights", hint=f"use --model {weights}")
    path = Path(model or "")
    if path.suffix.lower() not in SUFFIXES:
        return None
    if weights is not None:
        raise UsageError(f"{path} holds its weights", hint="leave --weights out")
    return path.expanduser()
