"""Options that several commands have, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detrcli.cli.complete import model_names

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Where named data sets lie.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps [default: the fastest].")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="FAMILY or FAMILY/VARIANT, see `detr zoo list`.", autocompletion=model_names
    ),
]
ModelOrFile = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="FAMILY or FAMILY/VARIANT, see `detr zoo list`; or an exported file.",
        autocompletion=model_names,
    ),
]
TrainedWeights = Annotated[
    str | None,
    typer.Option("--weights", help="A file, a run or OWNER/REPO [default: the newest run, else the zoo's]."),
]
