"""`detr profile`: parameters, multiply-adds and time, by part, beside what the papers say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detrcli.cli import console
from detrcli.cli.complete import model_names

if TYPE_CHECKING:
    from detrcli.plugins import Model
    from detrcli.profile.run import Latency, Profile, Size

Form = Literal["table", "json", "csv", "markdown"]


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
    latency: Annotated[bool, typer.Option("--latency", help="Time a forward pass on this machine.")] = False,
    by_part: Annotated[
        bool, typer.Option("--by-part", help="Backbone, projection, encoder and decoder by layer, heads.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare-published", help="Beside the paper's numbers, with the difference.")
    ] = False,
    size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH, or coco100: the mean over 100 COCO pictures, as the papers do.")
    ] = "coco100",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    flops_per_mac: Annotated[int, typer.Option(min=1, max=2, help="1 as the papers count, or 2.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="For --latency: cpu, cuda, … [default: the fastest].")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="PATH=VALUE of the model's configuration: what if?")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Count what models cost; nothing is downloaded, and nothing but --latency is executed."""
    console.settings.json = as_json
    from detrcli.config import assign, parse_assignments
    from detrcli.plugins import models, resolve

    chosen = [resolve(name) for name in model] if model else models()
    changes = parse_assignments(set_ or [])
    chosen = [m.configured(assign(m.config, changes)) for m in chosen]
    from detrcli.profile.run import parse_size

    parsed = parse_size(size)
    everything = not (gflops or params or latency)
    rows = _measure(chosen, parsed, batch, latency, device)
    shown = Shown(gflops or everything, params or everything, latency, compare, flops_per_mac)
    if as_json:
        console.emit_json(
            {
                "convention": _convention(flops_per_mac),
                "size": size,
                "models": [_document(p, t, shown) for p, t in rows],
            }
        )
        return
    _tell(rows, shown, by_part, "csv" if as_csv else "markdown" if as_markdown else "table")
    console.note(f"{_convention(flops_per_mac)}; pictures: {size}, batch {batch}")
    for found, _ in rows:
        for name, calls in found.unknown.items():
            console.note(f"{found.model.name}: not counted: {calls} calls of {name}")


class Shown:
    """Which columns were asked for."""

    def __init__(self, gflops: bool, params: bool, latency: bool, compare: bool, flops_per_mac: int) -> None:
        self.gflops, self.params, self.latency, self.compare = gflops, params, latency, compare
        self.factor = flops_per_mac


def _measure(
    chosen: list[Model], size: str | Size, batch: int, with_time: bool, device: str | None
) -> list[tuple[Profile, Latency | None]]:
    from detrcli.nn.inference import choose_device
    from detrcli.profile.run import latency, profile

    rows: list[tuple[Profile, Latency | None]] = []
    place = str(choose_device(device)) if with_time else ""
    with console.progress("models", len(chosen)) as ticker:
        for model in chosen:
            ticker.tell(model.name)
            timed = None
            if with_time:
                timed = latency(
                    model, size=(800, 1066) if isinstance(size, str) else size, batch=batch, device=place
                )
            rows.append((profile(model, size=size, batch=batch), timed))
            ticker.advance()
    return rows


def _convention(factor: int) -> str:
    return f"one multiply-add counts {'once' if factor == 1 else 'twice'}: convolutions, linear layers, attention products, sampling"


def _cells(found: Profile, timed: Latency | None, shown: Shown) -> dict[str, str]:
    from detrcli.profile.run import against_published

    cells = {"model": found.model.name}
    if shown.params:
        cells["params (M)"] = f"{found.params / 1e6:.1f}"
    if shown.gflops:
        cells["GFLOPs"] = f"{found.macs * shown.factor / 1e9:.1f}"
    if timed is not None:
        cells |= {"ms": f"{timed.median * 1e3:.0f}", "ms p90": f"{timed.p90 * 1e3:.0f}", "on": timed.device}
    if shown.compare:
        differences = {d.what: d for d in against_published(found)}
        for what, name in (("parameters (M)", "published params"), ("GFLOPs", "published GFLOPs")):
            d = differences.get(what)
            cells[name] = "" if d is None else f"{d.published:g} ({d.percent:+.1f} %)"
    return cells


def _document(found: Profile, timed: Latency | None, shown: Shown) -> dict[str, Any]:
    from detrcli.profile.run import against_published

    document: dict[str, Any] = {
        "name": found.model.name,
        "params": found.params,
        "trainable": found.trainable,
        "params_by_part": found.params_by_part,
        "flops": found.macs * shown.factor,
        "flops_by_part": {part: value * shown.factor for part, value in found.by_part.items()},
        "flops_by_operator": {name: value * shown.factor for name, value in found.by_operator.items()},
        "not_counted": found.unknown,
        "published": [
            {"what": d.what, "published": d.published, "counted": d.counted, "percent": d.percent}
            for d in against_published(found)
        ],
    }
    if timed is not None:
        document["latency"] = {
            "device": timed.device,
            "median_s": timed.median,
            "p90_s": timed.p90,
            "runs": timed.runs,
        }
        document["latency"]["memory_bytes"] = timed.memory
    return document


def _tell(rows: list[tuple[Profile, Latency | None]], shown: Shown, by_part: bool, form: Form) -> None:
    tables = [_cells(found, timed, shown) for found, timed in rows]
    if by_part:
        tables = [cells for found, _ in rows for cells in _part_rows(found, shown)]
    columns = list(tables[0]) if tables else []
    body = [[cells[column] for column in columns] for cells in tables]
    if form == "csv":
        for row in [columns, *body]:
            console.say(",".join(f'"{cell}"' if "," in cell else cell for cell in row))
    elif form == "markdown":
        for row in [columns, ["---"] + ["---:"] * (len(columns) - 1), *body]:
            console.say(f"| {' | '.join(row)} |")
    else:
        console.table(columns, body, right=columns[1:])


def _part_rows(found: Profile, shown: Shown) -> list[dict[str, str]]:
    rows = []
    for part, value in found.by_part.items():
        count = found.params_by_part.get(part)
        rows.append(
            {
                "part": f"{found.model.name} {part}" if "." not in part else f"  {part}",
                "params (M)": f"{count / 1e6:.2f}" if count else "",
                "GFLOPs": f"{value * shown.factor / 1e9:.2f}",
                "share": f"{100 * value / found.macs:.1f} %",
            }
        )
    return rows
