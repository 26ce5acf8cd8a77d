"""The names of classes that others state beside their weights: `id2label` of the config.json that transformers writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrcli.data.coco_classes import coco_of
from detrcli.types import Categories

CONFIG = "config.json"


def beside(weights: Path) -> Path | None:
    """The configuration in a weights file's folder."""
    path = weights.with_name(CONFIG)
    return path if path.is_file() else None


def named_in(config: Path, count: int) -> Categories | None:
    """The classes that a configuration names, if there are `count`, each under a name of its own; COCO's with COCO's ids."""
    names = _names(config)
    known = coco_of(count)
    if len(names) != count:
        return None
    if known and all(a == b for a, b in zip(names, known.names, strict=True) if not b.startswith("unused ")):
        return known
    return Categories(tuple(range(count)), tuple(names)) if len(set(names)) == count else None


def _names(config: Path) -> list[str]:
    try:
        content: Any = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # it only helps, and may be of anything
        return []
    labels = content.get("id2label") if isinstance(content, Mapping) else None
    if not isinstance(labels, Mapping):
        return []
    names = [labels.get(str(label)) for label in range(len(labels))]
    return [name for name in names if isinstance(name, str)]
