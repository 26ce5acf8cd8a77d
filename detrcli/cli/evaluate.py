"""`detr eval`: score a model on a data set, or detections that were saved before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detrcli.cli import console
from detrcli.cli.complete import data_names
from detrcli.cli.options import AsJson, DataRoot, Device, ModelOrFile, TrainedWeights
from detrcli.errors import UsageError, typed

if TYPE_CHECKING:
    from detrcli.data.annotations import Dataset
    from detrcli.evaluate.coco import CocoMetrics
    from detrcli.evaluate.run import EvalResult
    from detrcli.evaluate.tables import DetectionTable

Scorer = Literal["auto", "pycocotools", "ultrafast"]

TITLES = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl",
    "ar1": "AR1", "ar10": "AR10", "ar100": "AR100", "ar_small": "ARs", "ar_medium": "ARm", "ar_large": "ARl",
}  # fmt: skip
CLASS_COLUMNS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="A data set: name, folder or COCO file.", metavar="DATA", autocompletion=data_names
        ),
    ],
    model: ModelOrFile = None,
    weights: TrainedWeights = None,
    detections: Annotated[
        Path | None, typer.Option(help="Score this COCO results file; no model runs.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which part of the data set [default: val, or the only one].")
    ] = None,
    data_root: DataRoot = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that read images, for each device [default: 0, on a GPU up to 8]."
        ),
    ] = None,
    device: Device = None,
    devices: Annotated[int, typer.Option(min=1, help="Processes that share the images.")] = 1,
    amp: Annotated[Literal["bf16", "off"], typer.Option(help="Compute in 16 bits, or not.")] = "off",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    scorer: Annotated[Scorer, typer.Option(help="What computes the numbers.")] = "auto",
    per_class: Annotated[bool, typer.Option("--per-class", help="Show a table of the classes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the twelve COCO numbers, over all classes and for each.

    Examples: detr eval coco --model detr/r50 · detr eval coco --detections dets.json --per-class
    """
    console.settings.json = as_json
    if (detections is None) == (model is None and weights is None):
        raise UsageError(
            "give either a model or saved detections",
            hint=f"{typed('detr', 'eval', data, '--model', 'FAMILY')}, or --detections FILE",
        )
    if detections is not None:
        _refuse(
            batch_size=batch_size,
            workers=workers,
            device=device,
            devices=devices > 1,
            amp=amp != "off",
        )
        from detrcli.evaluate.truth import load_truth

        dataset = load_truth(data, split, data_root, pictures=False)
        images = min(limit or len(dataset), len(dataset))
        coco, table = _score_saved(dataset, images, detections, scorer)
        about: dict[str, Any] = {"split": dataset.split, "detections": str(detections), "images": images}
        what = detections.stem
    else:
        result = _score_model(
            data, model, weights, out, split=split, data_root=data_root, batch_size=batch_size, workers=workers,
            device=device, devices=devices, amp=amp == "bf16", limit=limit, scorer=scorer,
        )  # fmt: skip
        coco, table, what = result.coco, result.detections, result.model
        about = {"split": result.split, "model": result.model, "weights": result.weights, "amp": amp}
        about |= {
            "images": result.images,
            "batch_size": result.batch_size,
            "seconds": round(result.seconds, 3),
        }
        about["images_per_second"] = round(result.images_per_second, 3)
    if limit is not None:
        about["limit"] = limit
    _finish(coco, table, {"data": data, **about}, what, out, per_class, as_json)


def _refuse(**options: object) -> None:
    """Options for a model, where none runs."""
    for name, given in options.items():
        if given:
            raise UsageError(
                f"--{name.replace('_', '-')} is for models, and saved detections need none",
                hint="leave it out, or give --model in place of --detections",
            )


def _score_saved(
    dataset: Dataset, images: int, path: Path, scorer: Scorer
) -> tuple[CocoMetrics, DetectionTable]:
    """On the first so many images; what was saved for others is left out, unless the data set does not know them."""
    import numpy as np

    from detrcli.evaluate.coco import score
    from detrcli.evaluate.saved import in_ids_of
    from detrcli.evaluate.tables import DetectionTable, TruthTable

    table, notes = in_ids_of(dataset, DetectionTable.read(path), path, images)
    if images < len(dataset):
        table.check_against(TruthTable.of(dataset), str(path))
        dataset = dataset.select(range(images))
        table = table.rows(np.flatnonzero(np.isin(table.image_ids, dataset.annotations.image_ids)))
    return score(TruthTable.of(dataset), table, backend=scorer, where=str(path), notes=notes), table


def _score_model(
    data: str, model: str | None, weights: str | None, out: Path | None, **options: Any
) -> EvalResult:
    """What is wrong with the names is told before torch is loaded."""
    from detrcli.api import evaluate as run
    from detrcli.export.description import exported_file

    if exported_file(model, weights) is None:
        _tell_choice(model, weights, options["batch_size"])
    _check_what_comes_last(options["scorer"], out)
    return run(data, model, weights=weights, progress=_progress, **options)


def _check_what_comes_last(scorer: Scorer, out: Path | None) -> None:
    """Hours of a model's work are not to be lost for it."""
    from detrcli.evaluate.coco import choose_backend
    from detrcli.runs import check_place

    choose_backend(scorer)
    check_place("eval", out)


def _tell_choice(model: str | None, weights: str | None, batch_size: int | None) -> None:
    from detrcli.weights.resolve import choose

    choice = choose(model, weights)
    console.note(f"{choice.model.name}: {choice.why}")
    only = choice.model.family.eval_batch_size(choice.model.config)
    if only is not None and batch_size is None:
        console.note(
            f"{choice.model.name} saw no padding in training: batches of {only}; --batch-size changes that"
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    with console.progress("images", total) as ticker:
        yield ticker.advance


def _finish(
    coco: CocoMetrics, table: DetectionTable, about: dict[str, Any], what: str, out: Path | None, per_class: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Save, then show; of several processes only the first."""
    if int(os.environ.get("RANK", "0")):
        return
    from detrcli.evaluate import report
    from detrcli.runs import new_run

    folder = new_run("eval", f"{what}-{Path(about['data']).stem}", out)
    report.write(folder, coco, table, about)
    _show(coco, about, folder, per_class, as_json)


def _show(coco: CocoMetrics, about: dict[str, Any], folder: Path, per_class: bool, as_json: bool) -> None:
    from detrcli.evaluate.report import document

    for note in coco.notes:
        console.note(f"note: {note}")
    if as_json:
        console.emit_json(document(coco, about) | {"out": str(folder)})
        return
    if per_class:
        rows = [
            (c.name, str(c.objects), *(_percent(c.metrics[key]) for key in CLASS_COLUMNS))
            for c in coco.classes
        ]
        titles = [TITLES[key] for key in CLASS_COLUMNS]
        console.table(("class", "objects", *titles), rows, right=("objects", *titles))
    row = [_percent(value) for value in coco.metrics.values()]
    console.table(list(TITLES.values()), [row], right=list(TITLES.values()))
    if "images_per_second" in about:
        console.note(f"{about['images']} images, {about['images_per_second']:.2f} images/s")
    console.note(f"scored by {coco.backend}; numbers, classes and detections in {folder}")


def _percent(value: float) -> str:
    return "–" if value < 0 else f"{100 * value:.1f}"
