"""Showing what was measured: curves as a picture, a page for people, tables for spreadsheets. Made from run folders alone."""

from __future__ import annotations

from pathlib import Path

PAGE_FILE, CURVES_FILE = "report.html", "curves.png"


def refresh(folder: Path) -> None:
    """Everything that follows from a run's metrics, anew: tables, curves, page."""
    from detrcli.files import replacing
    from detrcli.report import chart, page, png, tables
    from detrcli.runs import shown
    from detrcli.runs.run import open_run

    run = open_run(folder)
    tables.write(folder)
    png.write(folder / CURVES_FILE, chart.of_run(run.history()), shown(run.name))
    with replacing(folder / PAGE_FILE) as temporary:
        temporary.write_text(page.of_run(run), encoding="utf-8")
