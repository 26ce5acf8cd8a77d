"""`detr profile`: parameters, multiply-adds, time and memory, by part, beside what the papers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detrcli.cli import console, profile_tables
from detrcli.cli.complete import model_names
from detrcli.cli.options import AsJson

if TYPE_CHECKING:
    from detrcli.cli.profile_tables import Row
    from detrcli.plugins import Model
    from detrcli.profile.published import Counting


def profile(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="FAMILY or FAMILY/VARIANT; may be repeated [default: the whole zoo].",
            autocompletion=model_names,
        ),
    ] = None,
    gflops: Annotated[bool, typer.Option("--gflops", help="Multiply-adds, in billions.")] = False,
    params: Annotated[bool, typer.Option("--params", help="Parameters.")] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time forward passes here; several models take turns.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Activations of prediction and of training, without running.")
    ] = False,
    by_part: Annotated[
        bool, typer.Option("--by-part", help="Backbone, projection, encoder and decoder by layer, heads.")
    ] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="What bounds each part on this machine; implies --latency.")
    ] = False,
    compare_published: Annotated[
        bool, typer.Option("--compare-published", help="Beside the paper's numbers, counted at its sizes.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="Two models in turns: time and the ratio of the second to the first."
        ),
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="By part, as published beside what --set makes of it.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="PATH=VALUE of the model's configuration.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="HEIGHTxWIDTH, or coco100: the mean over 100 COCO pictures, as the papers do [default: coco100]."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    flops_per_mac: Annotated[int, typer.Option(min=1, max=2, help="1 as the papers count, or 2.")] = 1,
    also: Annotated[
        list[str] | None, typer.Option(help="norms, softmax: count these too, as some counters do.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="To time on: cpu, cuda, … [default: the fastest].")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw published AP over counted GFLOPs into a .svg or .png file; - draws here, in letters."
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count what models cost; nothing is downloaded, and nothing is run unless time is asked for."""
    from detrcli.config import parse_assignments

    console.settings.json = as_json
    if plot:
        _refuse_plot(plot, bool(set_), {"--json": as_json, "--csv": as_csv, "--markdown": as_markdown})
    latency = latency or roofline or compare is not None
    chosen = _choose([*(model or []), *(compare or ())])
    changed = _changed(chosen, set_ or [], what_if)
    shown = profile_tables.Shown(
        gflops=gflops or not (params or latency or memory),
        params=params or not (gflops or latency or memory),
        latency=latency,
        memory=memory,
        published=compare_published,
        factor=flops_per_mac,
    )
    countings = _countings(changed, size, also or [], compare_published)
    rows = _measure(countings, batch, shown, device)
    about = _about(countings, shown, batch)
    if set_:
        about["settings"] = parse_assignments(set_)
    if what_if:
        usual = _countings(chosen, size, also or [], compare_published)
        before = _measure(usual, batch, replace(shown, latency=False), None)
        rows = [replace(row, before=old) for row, old in zip(rows, before, strict=True)]
    if roofline:
        rows = _under_the_roof(rows)
    if what_if:
        tables = [profile_tables.what_if(row, shown, as_csv) for row in rows]
    elif roofline:
        tables = [profile_tables.roofline(rows)]
    elif by_part:
        tables = [profile_tables.by_part(row, shown, as_csv) for row in rows]
    else:
        tables = [profile_tables.whole(rows, shown)]
    if plot:
        _plot(rows, plot)
    if as_json:
        console.emit_json({**about, "models": [profile_tables.document(row, shown) for row in rows]})
        return
    form: Literal["table", "csv", "markdown"] = "csv" if as_csv else "markdown" if as_markdown else "table"
    if as_csv:  # one header
        tables = [[row for table in tables for row in table]]
    for table in tables:
        profile_tables.show(table, form)
    _tell(rows, about, by_part, compare_published)


def _choose(names: list[str]) -> list[Model]:
    from detrcli.plugins import models, resolve

    return [resolve(name) for name in names] or models()


def _changed(chosen: list[Model], settings: list[str], what_if: bool) -> list[Model]:
    from detrcli.config import assign, parse_assignments
    from detrcli.errors import UsageError

    if what_if and not settings:
        raise UsageError(
            "--what-if asks what?", hint="add --set PATH=VALUE, for example --set num_queries=100"
        )
    changes = parse_assignments(settings)
    return [m.configured(assign(m.config, changes)) for m in chosen]


def _countings(chosen: list[Model], size: str | None, also: list[str], as_published: bool) -> list[Counting]:
    """As each paper counted where it is compared with; but the size and the operators that are asked for are taken."""
    from detrcli.profile.formulas import extras
    from detrcli.profile.published import Counting, as_its_paper
    from detrcli.profile.sizes import parse_size

    countings = [as_its_paper(model) if as_published else Counting(model) for model in chosen]
    if size is not None:
        countings = [replace(counting, size=parse_size(size)) for counting in countings]
    return [replace(counting, extra=extras(also) | counting.extra) for counting in countings]


def _measure(
    countings: list[Counting], batch: int, shown: profile_tables.Shown, device: str | None
) -> list[Row]:
    from detrcli.profile import run
    from detrcli.profile.timing import latencies

    rows: list[Row] = []
    with console.progress("models", len(countings)) as ticker:
        for counting in countings:
            ticker.tell(counting.model.name)
            if shown.latency and isinstance(counting.size, str):
                counting = replace(counting, size=run.TYPICAL)
            memory = run.memory(counting.model, size=counting.size, batch=batch) if shown.memory else None
            rows.append(profile_tables.Row(counting.profile(batch), memory))
            ticker.advance()
    if not shown.latency:
        return rows
    from detrcli.nn.inference import choose_device

    size = countings[0].size
    one = run.TYPICAL if isinstance(size, str) else size
    timed = latencies(
        [counting.model for counting in countings], size=one, batch=batch, device=str(choose_device(device))
    )
    return [replace(row, latency=latency) for row, latency in zip(rows, timed, strict=True)]


def _under_the_roof(rows: list[Row]) -> list[Row]:
    from detrcli.profile.roofline import bounds, measure

    timed = [(row, row.latency) for row in rows if row.latency]
    if not timed:
        return rows
    machine = measure(timed[0][1].device)
    return [replace(row, roof=tuple(bounds(row.profile, latency, machine))) for row, latency in timed]


def _about(countings: list[Counting], shown: profile_tables.Shown, batch: int) -> dict[str, object]:
    from detrcli.profile.run import TYPICAL
    from detrcli.profile.sizes import written

    extras = [c.extra for c in countings]
    shared = frozenset.intersection(*extras) if extras else frozenset()
    once = "once" if shown.factor == 1 else "twice"
    what = ", ".join(["convolutions", "linear layers", "attention products", "sampling", *sorted(shared)])
    used = {written(TYPICAL if shown.latency and isinstance(c.size, str) else c.size) for c in countings}
    about: dict[str, object] = {
        "convention": f"one multiply-add counts {once}: {what}",
        "sizes": sorted(used),
        "batch": batch,
        "besides": {c.model.name: sorted(c.extra - shared) for c in countings if c.extra - shared},
    }
    if shown.latency:
        from detrcli.environment import collect

        facts = collect()
        about["environment"] = {name: facts[name] for name in ("packages", "devices", "kernels", "speed")}
    return about


def _refuse_plot(path: Path, changed: bool, whole_stdout: dict[str, bool]) -> None:
    """Before minutes of counting."""
    from detrcli.errors import UsageError
    from detrcli.files import check_writable

    if changed:
        raise UsageError(
            "--plot draws published AP, which a model changed by --set does not have",
            hint="leave --set or --plot out",
        )
    taken = [option for option, given in whole_stdout.items() if given]
    if str(path) == "-" and taken:
        raise UsageError(f"{taken[0]} has stdout for itself", hint="--plot FILE.svg")
    if str(path) != "-":
        check_writable(path)


def _plot(rows: list[Row], path: Path) -> None:
    from detrcli.profile.plot import as_text, draw, points

    marks = points([row.profile for row in rows])
    if str(path) == "-":
        console.say(as_text(marks))
        return
    draw(marks, path)
    console.note(f"drawn: {path}")


def _tell(rows: list[Row], about: dict[str, object], by_part: bool, published: bool) -> None:
    sizes, besides = about["sizes"], about["besides"]
    assert isinstance(sizes, list)
    assert isinstance(besides, dict)
    console.note(f"{about['convention']}; pictures: {', '.join(sizes)}, batch {about['batch']}")
    for name, kinds in besides.items():
        console.note(f"{name}: {', '.join(kinds)} too, as its paper")
    for row in rows:
        for line in profile_tables.remarks(row, by_part, published):
            console.note(f"{row.profile.model.name}: {line}")
