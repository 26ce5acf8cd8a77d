"""A run folder as training leaves it, without the training: detr/tiny with seeded weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from detrcli.config import to_plain
from detrcli.plugins import resolve
from detrcli.types import Categories
from detrcli.weights import file
from detrcli.weights.metadata import Metadata

CATEGORIES = Categories((1, 2, 3), ("circle", "square", "triangle"))


def write_run(folder: Path, name: str = "detr/tiny") -> Path:
    model = resolve(name)
    torch.manual_seed(0)
    module = model.build(len(CATEGORIES))
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
