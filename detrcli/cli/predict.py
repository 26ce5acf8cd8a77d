"""`detr predict`: the objects in any pictures, in any form."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrcli.cli import console
from detrcli.errors import DataError, PartialError

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

    def add(self, result: Result) -> None:
        self.images += 1
        self.classes.update(found.name for found in result.detections)

    def fail(self, failure: Failure) -> None:
        console.note(f"failed: {failure.reason}")
        self.failures.append(failure)


def predict(
    sources: Annotated[list[str], typer.Argument(help="Pictures, folders or globs.", metavar="SOURCE…")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="FAMILY[/VARIANT]; see detr zoo list.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="A file, a run or OWNER/REPO on the Hub.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for the results; - writes JSON lines to stdout.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Any of image, json, jsonl, coco, yolo, csv, crops, with commas.")
    ] = "image,json",
    conf: Annotated[float, typer.Option(min=0, max=1, help="Lowest score to keep.")] = 0.3,
    top: Annotated[int | None, typer.Option(min=1, help="At most this many objects a picture.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Only these classes: names or ids, with commas.")
    ] = None,
    max_size: Annotated[int | None, typer.Option(min=32, help="Longest side that the model sees.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; without it the fastest.")
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Compute in 16 bits.")] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into folders of folders.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Find objects in pictures; draw them, and write them down.

    Examples: detr predict img.jpg --model lite_deformable · detr predict photos/ -m detr --format csv,crops
    """
    console.settings.json = as_json
    from detrcli.predict.load import load

    predictor = load(model, weights, device)
    console.note(f"{predictor.name}: {predictor.weights}")
    outputs, folder = _outputs(predictor, out, formats.split(","), conf)
    tally, records = Tally(), []
    with console.progress("pictures") as ticker:
        results = predictor.predict(
            sources,
            conf=conf,
            top=top,
            classes=[name for name in (classes or "").split(",") if name],
            batch=batch,
            max_size=max_size,
            amp=amp,
            recursive=recursive,
            on_failure=tally.fail,
        )
        for result in results:
            tally.add(result)
            outputs.write(result)
            if as_json:
                records.append(result.to_dict())
            ticker.advance()
    outputs.close(tally.failures)
    if as_json:
        failures = [failure.to_dict() for failure in tally.failures]
        about = {"model": predictor.name, "weights": predictor.weights, "out": folder}
        console.emit_json({**about, "images": records, "failures": failures})
    _finish(tally, folder)


def _outputs(
    predictor: Predictor, out: str | None, forms: list[str], conf: float
) -> tuple[Outputs, str | None]:
    from detrcli.predict.writers import JsonLines, Outputs, Target
    from detrcli.runs import new_run

    about = {"model": predictor.name, "weights": predictor.weights, "conf": conf}
    if out == "-":
        return Outputs([JsonLines(sys.stdout)]), None
    folder = Path(out) if out else new_run("predict", predictor.name)
    return Outputs.in_folder(Target(folder, predictor.categories, about), forms), str(folder)


def _finish(tally: Tally, folder: str | None) -> None:
    """Tell what was found; then what was not, as the exit code."""
    found = ", ".join(f"{count} {name}" for name, count in tally.classes.most_common(8)) or "nothing found"
    where = f"; results in {folder}" if folder else ""
    console.note(f"{tally.images} pictures: {found}{where}")
    if not tally.failures:
        return
    if not tally.images:
        raise DataError(tally.failures[0].reason if len(tally.failures) == 1 else "no picture could be read")
    raise PartialError(f"{len(tally.failures)} inputs failed, {tally.images} were done")
