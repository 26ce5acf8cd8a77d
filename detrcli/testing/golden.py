"""What a package stores of its models, so that a change that nobody meant is noticed: the names and shapes of its tensors, and what
its small models answer with weights that need no random numbers.

    python -m detrcli.testing FAMILY      writes golden.json into the family's package, after a change that was meant
"""

from __future__ import annotations

import hashlib
import json
import math
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detrcli.plugins import Model
from detrcli.testing.samples import CLASSES, skeleton
from detrcli.weights.fingerprint import fingerprint

FILE = "golden.json"


def stored(model: Model) -> dict[str, Any] | None:
    """What the package of the model holds of it."""
    path = files(_package(model)) / FILE
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, Any] | None = table.get(model.name)
    return found


def keys(model: Model) -> str:
    """A short hash of the names and shapes of all tensors, in their order: what weights files must fit."""
    lines = "\n".join(
        f"{name} {tuple(tensor.shape)}" for name, tensor in skeleton(model).state_dict().items()
    )
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def answers(model: Model) -> list[float]:
    """The fingerprint of the model with weights made of waves."""
    module = waved(model.build(CLASSES).eval())
    return fingerprint(module, model.variant.preprocess)


def waved(module: nn.Module) -> nn.Module:
    """A module with these weights, for checks whose answers must not be constant."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(module.state_dict().items()):
            if tensor.is_floating_point():
                tensor.copy_(_waves(name, tensor, number))
    return module


def _waves(name: str, like: torch.Tensor, number: int) -> torch.Tensor:
    """Values as large as an initialisation makes them; scales around one, variances positive."""
    place = torch.arange(like.numel(), dtype=torch.float64)
    wave = (place * (1.0 + 0.37 * (number % 11)) + number).sin().to(like.dtype).view(like.shape)
    if like.dim() < 2:
        return 1 + 0.1 * wave if name.endswith(("weight", "running_var")) else 0.1 * wave
    return wave / math.sqrt(like[0].numel())


def write(family: list[Model], small: int) -> Path:
    """Store what the family's models are now."""
    table = {m.name: _describe(m, answers(m) if m.variant.params <= small else None) for m in family}
    with as_file(files(_package(family[0]))) as package:
        path = Path(package) / FILE
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(before | table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _describe(model: Model, said: list[float] | None) -> dict[str, Any]:
    return {"keys": keys(model)} | ({"answers": said} if said else {})


def _package(model: Model) -> str:
    return model.found.entry_point.module.partition(".")[0]
