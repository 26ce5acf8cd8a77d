"""Models by name: the same names as on the command line.

>>> import detrcli
>>> "detr/r50" in detrcli.list_models()
True
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from detrcli.config import assign
from detrcli.plugins import models, resolve
from detrcli.plugins.registry import fold

if TYPE_CHECKING:
    from torch import nn


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
    return model.family.build_model(config, num_classes or model.variant.num_classes)
