"""One HTML file about a run, or about several side by side: curves, pictures, numbers, settings, environment.

The file needs nothing beside itself and asks nobody for anything: its policy forbids the browser every request. Whatever a run
says is escaped text.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from detrcli.report import chart, svg
from detrcli.report.compare import differing, duration
from detrcli.runs import History, Run, shown
from detrcli.runs.reading import document, number, opened
from detrcli.version import __version__

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SAMPLES = "samples"  # the folder of pictures, with what they are in samples.json
_COLUMNS = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large",
    "ar100": "AR100",
}  # fmt: skip
_MOST = 200  # rows of a table


def of_run(run: Run) -> str:
    history = run.history()
    parts = [
        f'<h1>{_text(run.name)}<span class="badge {_kind(run)}">{_text(run.status)}</span></h1>',
        f'<div class="soft">{_text(run.model)} on {_text(run.data_name)} · {_text(run.started_at)}</div>',
        *([f'<p class="failed">{_text(run.error, 500)}</p>'] if run.error else []),
        _cards(_headline(run)),
        _charts(chart.of_run(history)),
        _pictures(run.folder / SAMPLES),
        _evaluations(history),
        *_folded("Settings", run.settings()),
        *_folded("Environment", run.environment()),
        *(
            [f"<p class=soft>{history.damaged} lines of the metrics cannot be read.</p>"]
            if history.damaged
            else []
        ),
    ]
    return _page(run.name, parts)


def of_runs(runs: Sequence[Run]) -> str:
    histories = [run.history() for run in runs]
    head = ["", *(run.name for run in runs)]
    facts = [["status", *(run.status for run in runs)], ["model", *(run.model for run in runs)]]
    facts += [
        ["data", *(run.data_name for run in runs)],
        ["duration", *(duration(run) or "" for run in runs)],
    ]
    facts += [["best AP", *map(_score, (run.best_ap for run in runs))]]
    facts += [
        [f"last {name}", *(_score(run.metrics.get(key)) for run in runs)] for key, name in _COLUMNS.items()
    ]
    settings = [[path, *map(_value, values)] for path, values in differing(runs).items()]
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        _charts(chart.of_runs(runs, histories)),
        "<h2>Results</h2>" + _table(head, facts),
        "<h2>Settings that differ</h2>"
        + (_table(head, settings[:_MOST]) if settings else "<p class=soft>None.</p>"),
    ]
    return _page(" · ".join(run.name for run in runs), parts)


def _page(title: str, parts: Iterable[str]) -> str:
    style = (files(__package__) / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>detrcli {__version__}</footer></main></body></html>\n"
    )


def _headline(run: Run) -> dict[str, str]:
    metrics, best = run.metrics, run.best_ap
    facts = {
        "best AP": _score(best),
        "last AP50": _score(metrics.get("ap50")),
        "last AP75": _score(metrics.get("ap75")),
        "steps": "" if run.steps is None else f"{run.steps:,}",
        "duration": duration(run) or "",
    }
    return {name: value for name, value in facts.items() if value}


def _cards(facts: Mapping[str, str]) -> str:
    cards = (
        f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>'
        for name, value in facts.items()
    )
    return f'<div class="cards">{"".join(cards)}</div>' if facts else ""


def _charts(charts: Sequence[chart.Chart]) -> str:
    if not charts:
        return '<p class="soft">Nothing was measured yet.</p>'
    drawn = (f"<figure><figcaption>{_text(c.title)}</figcaption>{svg.draw(c)}</figure>" for c in charts)
    return f'<h2>Curves</h2><div class="charts">{"".join(drawn)}</div>'


def _pictures(folder: Path) -> str:
    said = document(folder / f"{SAMPLES}.json") or {}
    listed = said.get("pictures")
    figures = [_picture(folder, entry) for entry in (listed if isinstance(listed, list) else [])[:12]]
    if not any(figures):
        return ""
    step = number(said.get("step"))
    about = "Left as annotated, right as found" + (f" at step {step:g}" if step is not None else "")
    return f'<h2>Validation pictures</h2><p class="soft">{about}.</p><div class="pictures">{"".join(figures)}</div>'


def _picture(folder: Path, entry: Any) -> str:
    """A JPEG of the folder, inside the page; nothing for anything else."""
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"\d{1,3}\.jpg", name, re.ASCII):
        return ""
    try:
        with opened(folder / name) as file:
            content = file.read(4 << 20)
    except OSError:
        return ""
    if not content.startswith(b"\xff\xd8\xff"):
        return ""
    caption = _text(entry.get("caption", ""), 200)
    return (
        f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{b64encode(content).decode()}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _evaluations(history: History) -> str:
    rows = history.evaluations
    if not rows:
        return ""
    best = max(rows, key=lambda row: row.get("ap", -1.0))
    chosen = rows[-_MOST:] if best in rows[-_MOST:] else [best, *rows[1 - _MOST :]]
    names = [name for name in _COLUMNS if any(name in row for row in rows)]
    head = "".join(
        f'<th class="n">{_text(name)}</th>' for name in ("step", "epoch", *(_COLUMNS[n] for n in names))
    )
    body = "".join(
        f"<tr{' class=best' if row is best else ''}>"
        + "".join(f'<td class="n">{row.get(name, 0):,.0f}</td>' for name in ("step", "epoch"))
        + "".join(f'<td class="n">{_score(row.get(name))}</td>' for name in names)
        + "</tr>"
        for row in chosen
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Evaluations</h2><div class="scroll">{table}</div>'


def _folded(title: str, facts: Mapping[str, Any]) -> list[str]:
    rows = [[path, _value(value)] for path, value in _flat(facts)][:_MOST]
    return [f"<details><summary>{title}</summary>{_table(None, rows)}</details>"] if rows else []


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix.count(" · ") < 4:
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield prefix + key, value


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td><code>{_text(cell, 500)}</code></td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _kind(run: Run) -> str:
    return run.status.split()[0]  # one of ours, or "no"


def _score(value: float | None) -> str:
    return "" if value is None or value < 0 else f"{value:.3f}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value[:20])
    return "–" if value is None else str(value)


def _text(value: object, limit: int = 160) -> str:
    return escape(shown(value, limit))
