"""Models by name, from Python: the same names as on the command line.

>>> import detrcli
>>> "detr/r50" in detrcli.list_models()
True
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrcli.config import assign
from detrcli.errors import UsageError
from detrcli.plugins import Model, models, resolve
from detrcli.plugins.registry import fold

if TYPE_CHECKING:
    from torch import nn

    from detrcli.types import Categories
    from detrcli.weights.load import LoadReport


def list_models(pattern: str = "*") -> list[str]:
    """Names of all installed models, `FAMILY/VARIANT`; a shell pattern or a family narrows them (`"lite_*/h3l1*"`)."""
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
    model = model.configured(assign(model.config, overrides))
    module = model.build(num_classes)
    module.detrcli_model = model  # type: ignore[assignment]  # what `load_weights` needs to know
    return module


def load_weights(
    module: nn.Module, source: str | Path, *, classes: Categories | None = None, offline: bool = False
) -> LoadReport:
    """Fill a model of `create_model` from a file, a run folder or a Hub reference, in any layout its family knows.

    Everything must fit, or nothing is loaded and a `CheckpointError` lists what did not. With `classes`, those of the model,
    the file may have others: rows of the class heads are taken over by name.
    """
    from detrcli.weights.load import load_weights as load_into

    model = getattr(module, "detrcli_model", None)
    if not isinstance(model, Model):
        raise UsageError(
            "this module was not made by detrcli", hint="make it with detrcli.create_model(NAME)"
        )
    return load_into(module, source, model, classes=classes, offline=offline)
