"""`detr data`: look at data sets, check, convert and make them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detrcli.cli import console

app = typer.Typer(help="Check, show, convert, split and make data sets.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.callback()
def data() -> None:
    """Check, show, convert, split and make data sets."""


@app.command("shapes")
def shapes(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    preset: Annotated[str, typer.Option(help="easy (64 px) or hard (128 px).")] = "easy",
    train: Annotated[int | None, typer.Option(help="Pictures to train on [default: the preset's].")] = None,
    val: Annotated[int | None, typer.Option(help="Pictures to evaluate on [default: the preset's].")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
    as_json: Json = False,
) -> None:
    """Write the synthetic data set as a COCO folder."""
    from detrcli.data.shapes import write_shapes

    console.settings.json = as_json
    written = write_shapes(out, preset, train=train, val=val, seed=seed)
    if as_json:
        console.emit_json({"out": str(out), "images": written})
        return
    counts = ", ".join(f"{count} {split}" for split, count in written.items())
    console.say(f"{out}: {counts} pictures")
    console.note(f"next: detr train {out} --model FAMILY   or: detr data view {out}")
