"""One run, read from its folder, and the folder of them all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from detrcli.errors import DetrError, UsageError, nearest
from detrcli.runs import reading
from detrcli.runs.folder import root
from detrcli.runs.history import METRICS_FILE, History, read_history
from detrcli.runs.lock import held
from detrcli.runs.reading import document, number, printable, shown

RUN_FILE, CONFIG_FILE, ENVIRONMENT_FILE = "run.json", "config.toml", "environment.json"
STATUSES = ("running", "finished", "interrupted", "failed")
MAX_FILES = 100_000  # that are counted
DEEPEST = 8  # tables in tables of settings


@dataclass(frozen=True, slots=True)
class Run:
    """What a folder says about the training that made it.

    `status` is one of STATUSES, "died" (it says running, but nobody is), or "no run": there is no `run.json` to be read.
    """

    folder: Path
    status: str
    about: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return str(printable(self.folder.name))

    @property
    def model(self) -> str:
        return self._text("model")

    @property
    def data(self) -> str:
        return self._text("data")

    @property
    def data_name(self) -> str:
        return data_name(self.data)

    @property
    def started_at(self) -> str:
        return self._text("started_at")

    @property
    def finished_at(self) -> str:
        return self._text("finished_at")

    @property
    def seconds(self) -> float | None:
        """How long it has run, without the time between an end and a resumption; None while it does, and where it is not told."""
        return None if self.status == "running" else spent(self.about)

    @property
    def error(self) -> str:
        return self._text("error")

    @property
    def best_ap(self) -> float | None:
        return number(self.about.get("best_ap"))

    @property
    def steps(self) -> int | None:
        """How many were done, at the last evaluation or at the end."""
        step = number(self.about.get("step"))
        return None if step is None else int(step)

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation."""
        said = self.about.get("metrics")
        pairs = said.items() if isinstance(said, dict) else ()
        return {name: n for name, value in pairs if (n := number(value)) is not None}

    def settings(self) -> dict[str, Any]:
        """Every setting by its dotted path, as --set spells it; empty where they cannot be read."""
        said = reading.settings(self.folder / CONFIG_FILE) or {}
        parts = said.pop("set", None)
        return dict(_flat(said)) | dict(_flat(parts if isinstance(parts, dict) else {}))

    def environment(self) -> dict[str, Any]:
        return document(self.folder / ENVIRONMENT_FILE) or {}

    def history(self) -> History:
        return read_history(self.folder)

    def size(self) -> tuple[int, int]:
        """Files and bytes; links count as themselves."""
        sizes = list(_sizes(self.folder))
        return len(sizes), sum(sizes)

    def _text(self, name: str) -> str:
        value = self.about.get(name)
        return value if isinstance(value, str) else ""


def spent(about: Mapping[str, Any]) -> float | None:
    """The seconds that a run has run, by its `run.json`; of one from before they were counted those from start to end."""
    if (counted := number(about.get("seconds"))) is not None:
        return counted if counted >= 0 else None
    try:
        started, ended = (datetime.fromisoformat(about[name]) for name in ("started_at", "finished_at"))
        seconds = (ended - started).total_seconds()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return seconds if seconds >= 0 else None


def data_name(data: str) -> str:
    """What people call a data set: of a path the last part, which also says nothing of the machine."""
    return Path(data).name if os.path.isabs(data) else data


def read(folder: Path) -> dict[str, Any] | None:
    """What `run.json` of a folder says; None when it is no run."""
    return document(folder / RUN_FILE)


def open_run(folder: Path) -> Run:
    """The run in a folder, whatever is there."""
    about = read(folder) or {}
    status = about.get("status")
    if status not in STATUSES:
        return Run(folder, "no run", about)
    died = status == "running" and not held(folder / METRICS_FILE)
    return Run(folder, "died" if died else status, about)


def every() -> list[Run]:
    """What the folder of training runs holds, newest first; what is no run comes last."""
    try:
        folders = [path for path in root("train").iterdir() if path.is_dir()]
    except OSError:
        return []
    found = sorted((open_run(folder) for folder in folders), key=lambda run: run.name)
    return sorted(found, key=lambda run: (run.status != "no run", run.started_at), reverse=True)


def names() -> list[str]:
    """Of the runs there are."""
    return [run.name for run in every() if run.status != "no run"]


def find(run: str | os.PathLike[str]) -> Run:
    """The run of that name, or at that path."""
    name = os.fspath(run)
    for folder in (root("train") / name, Path(name).expanduser()):
        if name and _is_folder(folder):
            found = open_run(folder)
            if found.status != "no run":
                return found
            raise UsageError(f"{shown(folder)} is no run: it has no {RUN_FILE} that can be read")
    near = nearest(name, names())
    hint = f"did you mean {' or '.join(map(shown, near))}?" if near else "see: detr runs list"
    raise UsageError(f"there is no run {shown(name)!r} (looked in {root('train')})", hint=hint)


def may_remove(run: Run) -> None:
    """An error for what is not to be deleted: a link, what is no run, what holds more than a run, a run that is running."""
    folder = run.folder
    if folder.is_symlink() or _leads_out(folder):
        raise UsageError(
            f"{shown(folder)} leads to {shown(folder.resolve())}, which is elsewhere: nothing was deleted",
            hint="name the folder itself if it is what you mean",
        )
    if run.status == "no run":
        raise UsageError(f"{shown(folder)} is no run: nothing was deleted")
    around = [place for place in (root("train"), Path.cwd(), Path.home()) if _is_in(place, folder)]
    if around:
        raise UsageError(f"{shown(folder)} is around {shown(around[0])}: nothing was deleted")
    if run.status == "running":
        raise UsageError(
            f"{shown(run.name)} is running: nothing was deleted",
            hint="stop it first; it saves, and can be resumed",
        )


def remove(run: Run) -> None:
    """Delete a run's folder. Links in it are deleted, not followed."""
    may_remove(run)
    try:
        shutil.rmtree(run.folder)
    except OSError as error:
        raise DetrError(f"cannot delete {shown(run.folder)}: {error.strerror or error}") from error


def _leads_out(folder: Path) -> bool:
    """Whether a path that is spelled inside the folder of runs ends outside of it."""
    base = Path(os.path.abspath(root("train")))
    spelled = Path(os.path.abspath(folder))
    return spelled.is_relative_to(base) and not folder.resolve().is_relative_to(base.resolve())


def _is_in(place: Path, folder: Path) -> bool:
    return place.resolve().is_relative_to(folder.resolve())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for a path, a NUL
        return False


def _sizes(folder: Path) -> Iterator[int]:
    todo, seen = [folder], 0
    while todo and seen < MAX_FILES:
        try:
            entries = list(os.scandir(todo.pop()))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                todo.append(Path(entry.path))
                continue
            seen += 1
            with suppress(OSError):  # gone since: the run is running
                yield entry.stat(follow_symlinks=False).st_size


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value and prefix.count(".") < DEEPEST:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
