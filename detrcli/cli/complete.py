"""Names for shell completion, without torch."""

from __future__ import annotations


def model_names(incomplete: str) -> list[str]:
    """Families and FAMILY/VARIANT."""
    from detrcli.plugins import models

    found = models()
    names = list(dict.fromkeys([*(m.family.name for m in found), *(m.name for m in found)]))
    return [name for name in names if name.startswith(incomplete)]


def data_names(incomplete: str) -> list[str]:
    """Built-in and registered data sets; the shell completes paths itself."""
    from detrcli.data.places import names
    from detrcli.errors import DetrError

    try:
        return [name for name in names() if name.startswith(incomplete)]
    except DetrError:  # a broken datasets.toml; the command itself will say so
        return []


def run_names(incomplete: str) -> list[str]:
    """Runs in the folder of runs."""
    from detrcli.runs import names

    return [name for name in names() if name.startswith(incomplete) and name.isprintable()]
