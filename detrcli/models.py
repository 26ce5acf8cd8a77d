"""Models by name: the same names as on the command line.

>>> import detrcli
>>> "detr/r50" in detrcli.list_models()
True
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrcli.config import assign
from detrcli.errors import UsageError
from detrcli.plugins import models, resolve
from detrcli.plugins.registry import Model, fold

if TYPE_CHECKING:
    from torch import nn

    from detrcli.weights.load import LoadReport


def list_models(pattern: str = "*") -> list[str]:
    """Names of all installed models, `FAMILY/VARIANT`; a shell pattern narrows them (`"lite*/h3l1*"`)."""
    return [
        m.name
        for m in models()
        if fnmatch(fold(m.name), fold(pattern)) or fold(m.family.name) == fold(pattern)
    ]


def create_model(name: str, *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """An untrained model; `model(images, mask)` gives an `Output`. Overrides are fields of the variant's configuration.

    `num_classes` defaults to what the variant was published with. Nothing is downloaded.
    """
    model = resolve(name)
    config = assign(model.variant.config, overrides)
    classes = num_classes or model.variant.num_classes
    module = model.family.build_model(config, classes)
    variant = replace(model.variant, config=config, num_classes=classes)
    module._built_as = replace(model, variant=variant)  # type: ignore[assignment]  # nn.Module types attributes as tensors
    return module


def load_weights(model: nn.Module, source: str | Path) -> LoadReport:
    """Fill a model of `create_model` with a file, a run or a Hub reference (`owner/repo[@revision][:file]`).

    Our own files, the papers' and the Hub's layouts are recognised. What does not fit whole is an error that lists the names.
    """
    from detrcli.weights.load import load_weights as load

    built_as = getattr(model, "_built_as", None)
    if not isinstance(built_as, Model):
        raise UsageError(
            "load_weights needs a model of create_model",
            hint="detrcli.load_weights(detrcli.create_model(…), …)",
        )
    return load(model, source, built_as)
