"""Tiny models of every family, exported once a session by the public verb, as a user would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import detrcli
from detrcli.export.run import Exported, shake
from tests.tiny import write_run

FAMILIES = ("detr", "deformable_detr", "dynamic_detr", "d2etr", "lite_deformable", "lite_dino", "dino")

Make = Callable[..., Exported]


@pytest.fixture(scope="session")
def make(tmp_path_factory) -> Make:
    """make(family, suffix, **options): the same call gives the same file."""
    made: dict[Any, Exported] = {}

    def export(family: str, suffix: str = ".onnx", **options: Any) -> Exported:
        key = (family, suffix, *map(str, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            weights = write_run(folder / "run", f"{family}/tiny", shake) / "best.safetensors"
            made[key] = detrcli.export(None, folder / f"model{suffix}", weights=weights, **options)
        return made[key]

    return export


def weights_of(exported: Exported) -> Path:
    """The weights that a file of `make` came from."""
    return exported.file.parent / "run" / "best.safetensors"
