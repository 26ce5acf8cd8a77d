"""The command line: parse, call a verb, show what it returned. Nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from detrcli.cli import console
from detrcli.cli.lazy import LazyGroup, group
from detrcli.errors import DetrError
from detrcli.version import __version__

VERBS = {  # in the order of a project's life; then the catalogues
    "train": ("detrcli.cli.train:train", "Train a model."),
    "eval": ("detrcli.cli.evaluate:evaluate", "Score a model, or saved detections, with the COCO metrics."),
    "predict": ("detrcli.cli.predict:predict", "Find objects in pictures; draw them, and write them down."),
    "export": (
        "detrcli.cli.export:export",
        "Write a model as a file for other programs, and prove that it answers the same.",
    ),
    "profile": ("detrcli.cli.profile:profile", "Count parameters and GFLOPs; measure time."),
    "runs": ("detrcli.cli.runs:app", "List, show, compare and delete trainings."),
    "zoo": ("detrcli.cli.zoo:app", "Models, papers and weights."),
    "data": ("detrcli.cli.data:app", "Check, show, convert, split and make data sets."),
    "env": ("detrcli.cli.env:env", "Show versions, devices, kernels, caches and plugins."),
}


class _Shell(LazyGroup):
    """Ends quietly when the reader of stdout has gone, which is no failure of ours; typer's own answer is exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = group(
    VERBS,
    base=_Shell,
    name="detr",
    help="Detection transformers: train, evaluate, predict, export and profile with DETR and the papers that followed.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        console.say(f"detr {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Say more about what is done.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also DETR_DEBUG=1).")] = False,
) -> None:
    console.settings.quiet = quiet
    console.settings.verbose = verbose
    console.settings.debug = console.settings.debug or debug
    console.listen()


def main() -> None:
    """The console script. Users' mistakes end in one line and the exit code of their kind, never in a traceback."""
    console.tolerate_letters()
    try:
        app()
    except DetrError as error:
        if console.settings.debug:
            traceback.print_exc()
        console.show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if console.settings.debug:
            raise
        console.show_error(_unexpected(error))
        sys.exit(1)


def _unexpected(error: Exception) -> DetrError:
    hint = (
        "this is a defect of detrcli: please report it with the output of the same command after DETR_DEBUG=1"
    )
    return DetrError(f"{type(error).__name__}: {error}", hint=hint)
