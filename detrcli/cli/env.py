"""`detr env`: what a bug report needs."""

from __future__ import annotations

from typing import Annotated

import typer


def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show versions, devices, kernels, caches and plugins, and why each is as it is."""
    from detrcli.cli import console

    console.settings.json = as_json
    console.emit_json({})
