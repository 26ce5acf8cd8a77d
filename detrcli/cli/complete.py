"""Names for shell completion, without torch."""

from __future__ import annotations


def model_names(incomplete: str) -> list[str]:
    """Families and FAMILY/VARIANT."""
    from detrcli.plugins import models

    found = models()
    names = list(dict.fromkeys([*(m.family.name for m in found), *(m.name for m in found)]))
    return [name for name in names if name.startswith(incomplete)]


def data_names(incomplete: str) -> list[str]:
    """Built-in data sets; the shell completes paths itself."""
    return [name for name in ("coco", "shapes", "shapes:hard") if name.startswith(incomplete)]
