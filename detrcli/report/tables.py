"""The metrics of a run as CSV for spreadsheets: `steps.csv` and `evaluations.csv`, every row that was logged."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from detrcli.files import replacing
from detrcli.runs.history import rows

STEPS_FILE, EVALUATIONS_FILE = "steps.csv", "evaluations.csv"


def write(folder: Path) -> None:
    """Both tables, anew; lines that cannot be read are left out."""
    columns: dict[str, dict[str, None]] = {STEPS_FILE: {}, EVALUATIONS_FILE: {}}
    for row in _rows(folder):
        columns[_file_of(row)] |= dict.fromkeys(row)
    for name, found in columns.items():
        if found:
            _write(folder, name, list(found))


def _write(folder: Path, name: str, columns: list[str]) -> None:
    with replacing(folder / name) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(map(_safe, columns))
        for row in _rows(folder):
            if _file_of(row) == name:
                table.writerow([_plain(row.get(column)) for column in columns])


def _rows(folder: Path) -> Iterator[dict[str, float]]:
    return (row for row in rows(folder) if row is not None)


def _file_of(row: dict[str, float]) -> str:
    return STEPS_FILE if "loss" in row else EVALUATIONS_FILE


def _safe(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in "=+-@\t\r" else name


def _plain(value: float | None) -> int | float | str:
    if value is None:
        return ""
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
