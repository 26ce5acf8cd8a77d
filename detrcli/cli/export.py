"""`detr export`: a model as a file for other programs, verified before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detrcli.cli import console
from detrcli.cli.options import AsJson, Model
from detrcli.config import parse_assignments

if TYPE_CHECKING:
    from detrcli.export.run import Exported
    from detrcli.export.verify import Report, Rule


def export(
    model: Model = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A file, a run, OWNER/REPO, or random [default: the newest run, else the zoo's]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write [default: FAMILY-VARIANT.onnx, .pt2 or .xml here].")
    ] = None,
    format: Annotated[
        Literal["onnx", "pt2", "openvino"] | None,
        typer.Option(help="What kind of file [default: what --out says, else onnx]."),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            help="What may vary from run to run: batch,size, one of them, or none [default: what --size leaves]."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of all pictures [default: any size].")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Weights and arithmetic in 16 bits.")] = False,
    with_postprocess: Annotated[
        bool, typer.Option("--with-postprocess", help="Answer with scores, labels and corners of boxes.")
    ] = False,
    with_preprocess: Annotated[
        bool, typer.Option("--with-preprocess", help="Take pictures as bytes, 0 to 255, and normalise them.")
    ] = False,
    msda: Annotated[
        Literal["gridsample", "gather"],
        typer.Option(help="Deformable attention by GridSample or by indexing."),
    ] = "gridsample",
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the model.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file with the model.")
    ] = True,
    verify_data: Annotated[
        str | None, typer.Option(help="A data set: the AP of the file must be the model's.", metavar="DATA")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images of --verify-data to look at [default: 100].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, as a program of torch, or for OpenVINO, and prove that it answers the same.

    Examples: detr export -m detr --out detr.onnx · detr export -m detr/r50 --weights random --with-postprocess
    """
    from detrcli.api import export as run
    from detrcli.export.plan import parse_dynamic, parse_size

    console.settings.json = as_json
    made = run(
        model,
        out,
        weights=weights,
        format=format,
        dynamic=parse_dynamic(dynamic),
        size=parse_size(size),
        half=half,
        postprocess=with_postprocess,
        preprocess=with_preprocess,
        msda=msda,
        settings=parse_assignments(assignments or []),
        verify=verify,
        data=verify_data,
        limit=limit,
        tell=console.note,
    )
    if as_json:
        console.emit_json(made.to_dict())
    else:
        _show(made)


def _show(made: Exported) -> None:
    """The differences that were judged, and the file's name on stdout."""
    report = made.report
    if report is not None:
        console.note(f"verified on {len(report.cases)} batches; {_judged(report)}")
        if report.ap:
            console.note(f"AP of the model {report.ap['model']:.4f}, of the file {report.ap['file']:.4f}")
    console.note(f"{made.size / 1e6:.1f} MB; report in {made.report_file}")
    console.say(str(made.file))


def _judged(report: Report) -> str:
    """`largest difference: logits 6e-06, boxes 2e-07`; with the number of batches where not all were judged alike."""
    rules: tuple[Rule, ...] = ("largest", "median")
    counts = {rule: sum(case.rule == rule for case in report.cases) for rule in rules}
    parts = []
    for rule in (rule for rule in rules if counts[rule]):
        found = ", ".join(f"{name} {value:.1g}" for name, value in report.judged(rule).items())
        where = "" if counts[rule] == len(report.cases) else f" on {counts[rule]}"
        parts.append(f"{rule} difference{where}: {found}")
    return "; ".join(parts)
