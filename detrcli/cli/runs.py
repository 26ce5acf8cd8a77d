"""`detr runs`: the trainings on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrcli.cli import console
from detrcli.cli.complete import run_names
from detrcli.cli.lazy import group
from detrcli.cli.options import AsJson, Yes

if TYPE_CHECKING:
    from detrcli.runs import Run

app = group(
    {
        "list": (f"{__name__}:list_runs", "Every run: model, data, state, AP."),
        "show": (f"{__name__}:show", "One run: results, settings, files; its page and curves anew."),
        "compare": (f"{__name__}:compare", "Runs side by side: what was set differently, what came out."),
        "rm": (f"{__name__}:rm", "Delete runs."),
    },
    help="The trainings on this machine.",
)
Name = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A name from `detr runs list`, or a folder.", autocompletion=run_names
    ),
]
Names = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Names from `detr runs list`, or folders.", autocompletion=run_names
    ),
]
Html = Annotated[Path | None, typer.Option("--html", help="Write a page that needs nothing beside itself.")]
Png = Annotated[Path | None, typer.Option("--png", help="Write the curves as a picture.")]
SCORES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium", "ap_large": "AP large"}  # fmt: skip


def list_runs(as_json: AsJson = False) -> None:
    """List the runs in the folder of runs, newest first, and folders there that are none.

    States: running, finished, interrupted (resumable), failed, died (it was killed; resumable), no run.
    """
    console.settings.json = as_json
    from detrcli.runs import every, root

    runs = every()
    if as_json:
        console.emit_json({"root": str(root("train")), "runs": [_facts(run) for run in runs]})
        return
    if not runs:
        console.note(f"no runs in {root('train')}; make one: detr train shapes --model detr/tiny")
        return
    columns = ("run", "state", "model", "data", "best AP", "steps", "started", "size")
    console.table(columns, [_row(run) for run in runs], right=("best AP", "steps", "size"))


def show(run: Name, html: Html = None, png: Png = None, as_json: AsJson = False) -> None:
    """Show what a run did and what it left; --html and --png write its page and curves as they are now."""
    console.settings.json = as_json
    from detrcli.runs import find

    _check_names(html, png)
    found = find(run)
    if html or png:
        from detrcli.report import chart, page

        _write(html, lambda: page.of_run(found))
        _draw(png, lambda: chart.of_run(found.history()), found.name)
    if as_json:
        console.emit_json({**_facts(found), "settings": found.settings(), "environment": found.environment()})
        return
    _tell(found)


def compare(runs: Names, html: Html = None, png: Png = None, as_json: AsJson = False) -> None:
    """Show runs side by side: results, and the settings in which they differ; --html and --png draw their curves."""
    console.settings.json = as_json
    from detrcli.errors import UsageError
    from detrcli.report.compare import differing
    from detrcli.runs import find

    _check_names(html, png)
    if len(runs) < 2:
        raise UsageError("compare needs two runs or more", hint="see: detr runs list")
    found = [find(name) for name in runs]
    if html or png:
        from detrcli.report import chart, page

        _write(html, lambda: page.of_runs(found))
        _draw(png, lambda: chart.of_runs(found, [r.history() for r in found]), f"{len(found)} runs")
    different = differing(found)
    if as_json:
        console.emit_json({"runs": [_facts(run) for run in found], "settings": different})
        return
    columns = ["", *_columns(found)]
    console.table(columns, _results(found), title="results", right=columns[1:])
    if different:
        rows = [[_shown(path), *map(_value, values)] for path, values in different.items()]
        console.table(["", *_columns(found)], rows, title="settings that differ")
    else:
        console.say("the settings are the same")


def rm(
    runs: Names,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete the folders of runs. Asks first; what is no run, is running or is a link is refused, and then nothing is deleted."""
    console.settings.json = as_json
    from detrcli.errors import UsageError
    from detrcli.runs import find, may_remove, remove

    found = list({run.folder.absolute(): run for run in map(find, runs)}.values())
    for run in found:
        may_remove(run)
    if not yes and not _agreed(found):
        raise UsageError("nothing was deleted", hint="to delete without being asked: --yes")
    for run in found:
        remove(run)
        console.note(f"deleted {_shown(run.folder)}")
    if as_json:
        console.emit_json({"deleted": [_path(run) for run in found]})


def _agreed(runs: Sequence[Run]) -> bool:
    """Ask on a terminal; anywhere else nobody has agreed."""
    import sys

    if not sys.stdin.isatty() or console.settings.json:
        return False
    for run in runs:
        files, size = run.size()
        console.note(
            f"{_shown(run.folder)}: {files} files, {_bytes(size)}, {run.status}, best AP {_score(run.best_ap)}"
        )
    return typer.confirm(f"delete {len(runs)} run{'s' if len(runs) > 1 else ''}?", err=True)


def _facts(run: Run) -> dict[str, Any]:
    files, size = run.size()
    return {
        "name": run.name,
        "folder": _path(run),
        "status": run.status,
        "model": run.model,
        "data": run.data,
        "best_ap": run.best_ap,
        "steps": run.steps,
        "metrics": run.metrics,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "seconds": run.seconds,
        "error": run.error,
        "files": files,
        "bytes": size,
    }


def _row(run: Run) -> list[str]:
    link = " (link)" if run.folder.is_symlink() else ""
    steps = "" if run.steps is None else f"{run.steps}"
    facts = [run.name + link, run.status, run.model, run.data_name, _score(run.best_ap), steps]
    return [*map(_shown, facts), _shown(run.started_at[:16].replace("T", " ")), _bytes(run.size()[1])]


def _tell(run: Run) -> None:
    from detrcli.report.compare import duration

    facts = {
        "run": _path(run),
        "state": run.status,
        "model": run.model,
        "data": run.data,
        "started": run.started_at,
        "duration": duration(run) or "",
        "steps": "" if run.steps is None else str(run.steps),
        "best AP": _score(run.best_ap),
        **{f"last {name}": _score(run.metrics.get(key)) for key, name in SCORES.items()},
        "command": str(run.environment().get("command", "")),
        "error": run.error,
    }
    for name, value in facts.items():
        if value:
            console.say(f"{name + ':':<16}{_shown(value, 400)}")
    for path, value in run.settings().items():
        console.detail(f"  {_shown(path)} = {_value(value)}")
    console.note(_next(run))


def _next(run: Run) -> str:
    from detrcli.errors import typed

    folder, config = typed(_shown(run.folder, 400)), typed(_shown(run.folder / "config.toml", 400))
    if run.status in ("interrupted", "died"):
        return f"next: detr train --resume {folder}"
    if run.status == "finished":
        return f"next: detr predict IMAGE --weights {folder}   or again: detr train --config {config}"
    return f"settings: detr -v runs show {folder}"


def _results(runs: Sequence[Run]) -> list[list[str]]:
    from detrcli.report.compare import duration

    rows = [
        ["state", *(run.status for run in runs)],
        ["model", *(_shown(run.model) for run in runs)],
        ["data", *(_shown(run.data_name) for run in runs)],
        ["steps", *("" if run.steps is None else str(run.steps) for run in runs)],
        ["duration", *(duration(run) or "" for run in runs)],
        ["best AP", *(_score(run.best_ap) for run in runs)],
    ]
    scores = (
        [f"last {name}", *(_score(run.metrics.get(key)) for run in runs)] for key, name in SCORES.items()
    )
    return rows + [row for row in scores if any(row[1:])]


def _columns(runs: Sequence[Run]) -> list[str]:
    """The names of the runs, told apart where two have the same."""
    names = [_shown(run.name, 40) for run in runs]
    return [f"{i}: {name}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _check_names(html: Path | None, png: Path | None) -> None:
    """A file is what its name says."""
    from detrcli.errors import UsageError

    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html writes a .html file (value given: {html})", hint="--html page.html")
    if png is not None and png.suffix.lower() != ".png":
        raise UsageError(f"--png writes a .png file (value given: {png})", hint="--png curves.png")


def _write(path: Path | None, page: Any) -> None:
    if path is None:
        return
    from detrcli.files import replacing

    text = page()
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    console.note(f"wrote {path}")


def _draw(path: Path | None, charts: Any, title: str) -> None:
    if path is None:
        return
    from detrcli.report import png
    from detrcli.runs import shown

    png.write(path, charts(), shown(title))
    console.note(f"wrote {path}")


def _path(run: Run) -> str:
    from detrcli.runs.reading import printable

    return str(printable(str(run.folder)))


def _shown(value: object, limit: int = 60) -> str:
    from detrcli.runs import shown

    return shown(value, limit)


def _value(value: Any) -> str:
    return "–" if value is None else _shown(value)


def _score(value: float | None) -> str:
    return "" if value is None or value < 0 else f"{value:.3f}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
