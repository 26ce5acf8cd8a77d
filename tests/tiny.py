"""A run folder as training leaves it, without the training: detr/tiny with seeded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from detrcli.config import to_plain
from detrcli.plugins import resolve
from detrcli.types import Categories
from detrcli.weights import file
from detrcli.weights.metadata import Metadata

CATEGORIES = Categories((1, 2, 3), ("circle", "square", "triangle"))


def write_run(
    folder: Path, name: str = "detr/tiny", change: Callable[[nn.Module], None] | None = None
) -> Path:
    """`change` is done to the fresh model before it is saved."""
    model = resolve(name)
    torch.manual_seed(0)
    module = model.build(len(CATEGORIES))
    if change is not None:
        change(module)
    folder.mkdir(parents=True)
    about = Metadata(
        model=model.name,
        num_classes=len(CATEGORIES),
        config=to_plain(model.config),
        preprocess=model.variant.preprocess,
        categories=CATEGORIES,
    )
    file.save(folder / "best.safetensors", module.state_dict(), about)
    run = {"status": "finished", "model": model.name, "finished_at": "2026-01-01T00:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder
