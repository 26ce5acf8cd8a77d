"""`detr data`: look at data sets, check, repair, convert, split and make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrcli.cli import console
from detrcli.cli.complete import data_names
from detrcli.cli.lazy import group
from detrcli.cli.options import AsJson, DataRoot

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrcli.data.annotations import Dataset
    from detrcli.data.catalog import Source
    from detrcli.data.check import Report
    from detrcli.data.defects import Defects

app = group(
    {
        "check": (f"{__name__}:check", "Look for everything that spoils training or evaluation."),
        "info": (f"{__name__}:info", "Show splits, classes and sizes."),
        "view": (f"{__name__}:view", "Draw pictures with their boxes on one contact sheet."),
        "convert": (f"{__name__}:convert", "Write a data set in another format, pictures included."),
        "split": (f"{__name__}:split_", "Cut one part into train, val and test, every class in proportion."),
        "shapes": (f"{__name__}:shapes", "Write the synthetic data set as a COCO folder."),
    },
    help="Check, show, convert, split and make data sets.",
)


Data = Annotated[
    str,
    typer.Argument(
        help="A registered name (coco, shapes), a folder, a .json (COCO), a .yaml (YOLO), or hf:owner/name.",
        autocompletion=data_names,
    ),
]
Out = Annotated[Path, typer.Argument(help="A new folder.")]


def check(
    data: Data,
    fast: Annotated[bool, typer.Option("--fast", help="Read the pictures' headers only.")] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write a repaired copy (COCO) into this new folder.")
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Look for everything that spoils training or evaluation. Exit code 3 where there are errors."""
    from detrcli.data import check as checking
    from detrcli.data.write import check_new

    console.settings.json = as_json
    source = _find(data, data_root)
    if fix is not None:
        check_new(fix)  # before the work
    with console.progress("pictures checked") as ticker:
        report = checking.check(source, fast=fast, advance=ticker.advance)
    if not as_json:
        _show_report(report)
    if fix is not None:
        _write_copy(report, fix)
    if as_json:  # one document, also where the copy cannot be written
        console.emit_json({**report.to_json(), "repaired": str(fix) if fix else None})
    if fix is None and report.errors:
        if report.repairable and not as_json:
            console.note(f"next: detr data check {source.asked} --fix OUT   writes a repaired copy")
        raise typer.Exit(3)


def _write_copy(report: Report, out: Path) -> None:
    from detrcli.data.write import write_coco
    from detrcli.errors import DataError

    if report.emptied:
        raise DataError(
            f"no picture of {' and '.join(report.emptied)} can be used: there is nothing to make a copy of",
            hint=f"see why: detr data check {report.source.asked}",
        )
    write_coco(report.repaired(), out)
    console.note(f"repaired copy: {out}")


def _show_report(report: Report) -> None:
    for split, dataset in report.datasets.items():
        found = report.defects[split]
        size = f"{len(dataset)} images, {len(dataset.annotations.ids)} objects"
        console.say(f"{report.source.name} {split}: {size}, {found.errors or 'no'} errors")
        _show_defects(found)


def _show_defects(defects: Defects) -> None:
    for row in defects.to_json():
        console.say(
            f"  {row['severity']}: {row['kind']} × {row['count']}: {row['means']} (repair: {row['repair']})"
        )
        for example in row["examples"][:3]:
            console.say(f"      {example}")


def info(data: Data, data_root: DataRoot = None, as_json: AsJson = False) -> None:
    """Show splits, classes and sizes."""
    from detrcli.data.summary import summarise

    console.settings.json = as_json
    source = _find(data, data_root)
    datasets = {split: _load(source, split) for split in source.splits}
    summaries = {split: summarise(dataset) for split, dataset in datasets.items()}
    if as_json:
        parts = {split: summary.to_json() for split, summary in summaries.items()}
        console.emit_json({"data": source.name, "format": source.format, "splits": parts})
        return
    console.say(f"{source.name} ({source.format})")
    facts: dict[str, Callable[[str], str]] = {
        "images": lambda s: f"{summaries[s].images:,}",
        "… without objects": lambda s: f"{summaries[s].empty_images:,}",
        "objects": lambda s: f"{summaries[s].objects:,}",
        "… small / medium / large": lambda s: (
            f"{summaries[s].small} / {summaries[s].medium} / {summaries[s].large}"
        ),
        "crowds": lambda s: f"{summaries[s].crowds:,}",
        "most objects in an image": lambda s: f"{summaries[s].most_objects}",
        "width, median": lambda s: "{} … {}, {}".format(*_spread(summaries[s].width)),
        "height, median": lambda s: "{} … {}, {}".format(*_spread(summaries[s].height)),
    }
    splits = list(datasets)
    console.table(["", *splits], [[name, *map(fact, splits)] for name, fact in facts.items()], right=splits)
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary.classes))
    rows = [[name, *(f"{summaries[s].classes.get(name, 0):,}" for s in splits)] for name in names]
    console.table(["class", *splits], rows, right=splits)


def _spread(values: tuple[int, int, int]) -> tuple[int, int, int]:
    return values[0], values[2], values[1]


def view(
    data: Data,
    out: Annotated[Path, typer.Option(help="The contact sheet to write.")] = Path("sheet.png"),
    split: Annotated[str, typer.Option(help="Which part.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=400, help="How many pictures.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Which ones.")] = 0,
    image: Annotated[
        list[str] | None, typer.Option(help="This picture, by file name; may be repeated.")
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures with their boxes on one contact sheet."""
    from detrcli.data.sheet import sheet

    console.settings.json = as_json
    dataset = _load(_find(data, data_root), split)
    chosen = _named(dataset, image) if image else _drawn(dataset, count, seed)
    _save(sheet([(dataset.annotations.names[i], _annotated(dataset, i)) for i in chosen]), out)
    if as_json:
        names = [dataset.annotations.names[i] for i in chosen]
        console.emit_json({"out": str(out), "images": names})
    else:
        console.say(str(out))


def _save(picture: Image, out: Path) -> None:
    from detrcli.errors import UsageError
    from detrcli.files import replacing

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--out needs a .png or .jpg (value given: {out})", hint="--out sheet.png")
    with replacing(out) as temporary:
        picture.save(temporary, "PNG" if out.suffix.lower() == ".png" else "JPEG")


def _named(dataset: Dataset, names: list[str]) -> list[int]:
    from detrcli.errors import unknown

    known = {name: index for index, name in enumerate(dataset.annotations.names)}
    for name in names:
        if name not in known:
            raise unknown(f"picture in {dataset.name} {dataset.split}:", name, known)
    return [known[name] for name in names]


def _drawn(dataset: Dataset, count: int, seed: int) -> list[int]:
    import numpy as np

    order: list[int] = np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()
    return sorted(order)


def _annotated(dataset: Dataset, index: int) -> Image:
    from detrcli.predict.draw import annotate
    from detrcli.predict.result import Detection

    objects, owner = dataset.annotations.objects(index), dataset.categories
    found = [
        Detection(owner.ids[k], owner.names[k] + (" (crowd)" if crowd else ""), 1.0, (x, y, x + w, y + h))
        for k, (x, y, w, h), crowd in zip(
            objects.labels.tolist(), objects.boxes.tolist(), objects.crowd.tolist(), strict=True
        )
    ]
    return annotate(dataset.picture(index), found, scores=False)


def convert(
    data: Data,
    out: Out,
    to: Annotated[str, typer.Option(help="coco or yolo.")] = "coco",
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Write a data set in another format, pictures included."""
    from detrcli.data.write import WRITERS, check_new
    from detrcli.errors import unknown

    console.settings.json = as_json
    if to not in WRITERS:
        raise unknown("format", to, WRITERS)
    check_new(out)
    source = _find(data, data_root)
    splits = {split: _load(source, split, masks=True) for split in source.splits}
    WRITERS[to](splits, out)
    _tell_written(splits, out, as_json)


def split_(
    data: Data,
    out: Out,
    val: Annotated[float, typer.Option(help="The part to evaluate on.")] = 0.1,
    test: Annotated[float, typer.Option(help="The part to keep for the end.")] = 0.0,
    source_split: Annotated[str, typer.Option("--from", help="The part to cut.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="The same seed cuts the same way.")] = 0,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Cut one part of a data set into train, val and test, every class in proportion, as a COCO folder."""
    from detrcli.data.split import split
    from detrcli.data.write import check_new, write_coco

    console.settings.json = as_json
    check_new(out)
    dataset = _load(_find(data, data_root), source_split, masks=True)
    splits = split(dataset, {"val": val, "test": test}, seed=seed)
    write_coco(splits, out)
    _tell_written(splits, out, as_json)


def shapes(
    out: Out,
    preset: Annotated[str, typer.Option(help="easy (64 px) or hard (128 px).")] = "easy",
    train: Annotated[int | None, typer.Option(help="Pictures to train on [default: the preset's].")] = None,
    val: Annotated[int | None, typer.Option(help="Pictures to evaluate on [default: the preset's].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same pictures.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write the synthetic data set as a COCO folder."""
    from detrcli.data.shapes import write_shapes

    console.settings.json = as_json
    _tell_written(write_shapes(out, preset, train=train, val=val, seed=seed), out, as_json)


def _find(data: str, data_root: Path | None) -> Source:
    from detrcli.data.catalog import find

    return find(data, data_root)


def _load(source: Source, split: str, *, masks: bool = False) -> Dataset:
    """A split as it is, defects and all: `check` is the command that judges. With `masks` its outlines, too, to be written."""
    from detrcli.data.layouts import Options

    dataset = source.load(split, Options(masks=masks, strict=False))
    if dataset.defects.errors:
        console.note(f"{source.name} {split} has errors: see {dataset.check_command}")
    return dataset


def _tell_written(splits: dict[str, Dataset], out: Path, as_json: bool) -> None:
    from detrcli.errors import typed

    counts = {split: len(dataset) for split, dataset in splits.items()}
    if as_json:
        console.emit_json({"out": str(out), "images": counts})
        return
    console.say(f"{out}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    view, train = typed("detr", "data", "view", out), typed("detr", "train", out, "--model", "FAMILY")
    console.note(f"next: {view}   or: {train}")
