"""`detr predict`: the objects in any pictures, in any form."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detrcli.cli import console
from detrcli.cli.options import AsJson, Device, ModelOrFile, TrainedWeights
from detrcli.ending import ended_by_signal
from detrcli.errors import DataError, DetrError, PartialError, UsageError

if TYPE_CHECKING:
    from detrcli.predict.result import Failure, Result
    from detrcli.predict.run import Predictor
    from detrcli.predict.writers import Outputs


@dataclass(slots=True)
class Tally:
    """What a run has done so far."""

    images: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    last: Result | None = None
    records: list[dict[str, Any]] | None = None  # with --json

    def add(self, result: Result, stem: str | None) -> None:
        """With what its files are called, where it has any."""
        from detrcli.predict.writers import record

        self.images += 1
        self.classes.update(found.name for found in result.detections)
        self.last = result
        for note in result.notes:
            console.note(f"{visible(result.source)}: {note}")
        if self.records is not None:
            self.records.append(record(result, stem))

    def fail(self, failure: Failure) -> None:
        console.complain(f"failed: {visible(failure.reason)}")
        self.failures.append(failure)


def predict(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, URLs, or - for stdin.", metavar="SOURCE…")
    ],
    model: ModelOrFile = None,
    weights: TrainedWeights = None,
    out: Annotated[
        str | None,
        typer.Option(help="A folder, or - for JSON lines on stdout [default: runs/predict/MODEL-N]."),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Any of image, json, jsonl, coco, yolo, csv, crops; with commas [default: image,json].",
        ),
    ] = None,
    conf: Annotated[float, typer.Option(min=0, max=1, help="Lowest score to keep.")] = 0.3,
    top: Annotated[int | None, typer.Option(min=1, help="At most this many objects a picture.")] = None,
    classes: Annotated[str | None, typer.Option(help="Only these: names or ids, with commas.")] = None,
    max_size: Annotated[int | None, typer.Option(min=32, help="Longest side that the model sees.")] = None,
    tile: Annotated[
        int | None, typer.Option(min=64, help="Also look at overlapping squares of that many pixels.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at a time [default: 1].")] = None,
    device: Device = None,
    amp: Annotated[Literal["bf16", "off"], typer.Option(help="Compute in 16 bits, or not.")] = "off",
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into folders of folders.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find objects in pictures; draw them, and write them down.

    Examples: detr predict img.jpg -m detr · detr predict photos/ -m detr --format csv,crops · ls *.png | detr predict - -m detr --out -
    """
    console.settings.json = as_json
    if as_json and out == "-":
        raise UsageError("--json and --out - both want stdout", hint="leave one of them out")
    forms = _forms(formats, to_stdout=out == "-")
    predictor = _load(model, weights, device)
    tally = Tally(records=[] if as_json else None)
    settings: dict[str, Any] = {"conf": conf, "top": top, "max_size": max_size, "tile": tile}
    settings |= {"classes": _words(classes), "batch": batch or predictor.only_batch or 1, "amp": amp}
    options = settings | {"batch": batch, "amp": amp == "bf16"}
    options |= {"recursive": recursive, "leave_out": _own_folders(out)}
    results = predictor.predict(sources, on_failure=tally.fail, **options)
    writing = _outputs(predictor, out, forms, settings, tally)
    with ended_by_signal(), writing as (outputs, folder), console.progress("pictures") as ticker:
        for result in results:
            tally.add(result, outputs.write(result))
            ticker.advance()
    _show(tally, folder)
    if as_json:
        _emit(predictor, tally, folder)
    _fail(tally, as_json)


def visible(text: str) -> str:
    """A name or message on one line, whatever its letters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _forms(formats: str | None, *, to_stdout: bool) -> list[str]:
    forms = _words(formats) or (["jsonl"] if to_stdout else ["image", "json"])
    if to_stdout and forms != ["jsonl"]:
        raise UsageError(
            f"--out - writes JSON lines on stdout, no {', '.join(f for f in forms if f != 'jsonl')}",
            hint="name a folder: --out FOLDER",
        )
    return forms


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _load(model: str | None, weights: str | None, device: str | None) -> Predictor:
    """What is wrong with the names is told before torch is loaded."""
    from detrcli.export.description import exported_file
    from detrcli.weights.resolve import choose

    if (file := exported_file(model, weights)) is not None:
        from detrcli.export.runtime import load as load_file

        predictor = load_file(file, device)
        console.note(f"{predictor.name}: {predictor.weights}")
        return predictor
    choice = choose(model, weights)
    console.note(f"{choice.model.name}: {choice.why}")
    from detrcli.predict.load import load

    return load(choice, device)


def _own_folders(out: str | None) -> list[Path]:
    """Where predictions are drawn, which are no pictures to look at again."""
    from detrcli.runs import root

    return [root("predict"), *([Path(out)] if out else [])]


@contextmanager
def _outputs(
    predictor: Predictor, out: str | None, forms: list[str], settings: dict[str, Any], tally: Tally
) -> Iterator[tuple[Outputs, str | None]]:
    """The writers, closed whatever happens: what was found before an interruption is whole."""
    from detrcli.predict.writers import JsonLines, Outputs, Target, check_forms
    from detrcli.runs import new_run

    folder: str | None = None
    if out == "-":
        outputs = Outputs([JsonLines(sys.stdout)], "on stdout")
    else:
        check_forms(forms)  # before a folder is made for them
        place = new_run("predict", predictor.name, Path(out) if out else None)
        about = {"model": predictor.name, "weights": predictor.weights, "settings": settings}
        outputs, folder = Outputs.in_folder(Target(place, predictor.categories, about), forms), str(place)
    try:
        yield outputs, folder
    finally:
        outputs.close(tally.failures)


def _emit(predictor: Predictor, tally: Tally, folder: str | None) -> None:
    about = {"model": predictor.name, "weights": predictor.weights, "out": folder}
    failures = [failure.to_dict() for failure in tally.failures]
    console.emit_json({**about, "images": tally.records, "failures": failures})


def _show(tally: Tally, folder: str | None) -> None:
    """A summary in one line; for a single picture the picture, where the terminal can show it."""
    if tally.images == 1 and tally.last is not None and folder is not None:
        from detrcli.cli import preview

        preview.show(tally.last)
    found = ", ".join(f"{count} {visible(name)}" for name, count in tally.classes.most_common(8))
    more = len(tally.classes) - 8
    found += f" and {more} more classes" if more > 0 else ""
    what = "1 picture" if tally.images == 1 else f"{tally.images} pictures"
    console.note(f"{what}: {found or 'nothing found'}" + (f"; results in {folder}" if folder else ""))


def _fail(tally: Tally, as_json: bool) -> None:
    """What was not done, as the exit code. A JSON document that was printed has the reasons in it already."""
    if not tally.failures:
        return
    first, count = visible(tally.failures[0].reason), len(tally.failures)
    error: DetrError
    if tally.images:
        error = PartialError(f"{count} of {count + tally.images} inputs failed")
    else:
        error = DataError(first if count == 1 else f"no input could be read; the first: {first}")
    if as_json:
        raise typer.Exit(error.exit_code)
    raise error
