"""What a training run leaves behind.

run.json            what it is: status, model, data, best score, when            (rewritten whole)
config.toml         every setting, resolved: `--resume` goes on with it, `--config` runs it again
environment.json    versions, devices, kernels, command line, the project's commit
metrics.jsonl       one line a step that was logged, one a evaluation             (appended)
best.safetensors    the weights that scored best, with classes and preprocessing
last.safetensors    the newest weights
state.pt            what `--resume` continues from (see state.py); state-before.pt is the one before it

and, made from these by `detrcli.report` at evaluations and at the end: steps.csv, evaluations.csv, curves.png, report.html with
the pictures in samples/.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from detrcli import environment, runs
from detrcli.config import to_plain
from detrcli.errors import CheckpointError, DetrError, UsageError
from detrcli.files import left_over, replacing
from detrcli.plugins import resolve
from detrcli.report import refresh
from detrcli.runs import lock
from detrcli.runs.history import METRICS_FILE
from detrcli.runs.reading import document, printable, table
from detrcli.runs.run import CONFIG_FILE, ENVIRONMENT_FILE
from detrcli.train import settings
from detrcli.train.plan import HARMLESS, Plan, differences
from detrcli.types import Categories
from detrcli.version import __version__
from detrcli.weights import file
from detrcli.weights.metadata import Metadata

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Record:
    """The files of one run, written by rank 0 only."""

    folder: Path
    plan: Plan
    categories: Categories
    _lines: IO[bytes] | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)
    _since: float = field(default_factory=time.monotonic, init=False)
    _before: float = field(default=0.0, init=False)  # seconds that the run has run before it was resumed

    def start(self) -> None:
        """The first files of a new run; where they cannot be written, none of them and no folder stay behind."""
        ours: tuple[str, ...] = ()  # what is there before the folder is held may be another's
        try:
            self._open()
            runs.fresh(self.folder, but=METRICS_FILE)
            ours = (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE)
            self._settings(as_begun=True)
            self._json(ENVIRONMENT_FILE, environment.of_a_run())
            self.status("running")
        except DetrError:
            with suppress(OSError):  # the folder was there before, and is held
                for name in ours:
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()
            self.close()
            raise

    def _settings(self, *, as_begun: bool) -> None:
        config = self.folder / CONFIG_FILE
        with replacing(config) as temporary:
            temporary.write_text(settings.write(config, self.plan, as_begun=as_begun), encoding="utf-8")

    def _as_begun(self) -> bool:
        changes = differences(read_plan(self.folder), self.plan).keys() - HARMLESS
        return not changes and settings.is_as_begun(self.folder / CONFIG_FILE)

    def go_on(self, step: int, scored: int) -> None:
        """Continue at `step`, evaluated up to `scored`: what was logged beyond it by a process that died is forgotten."""
        lines = self._open()
        self._before = runs.spent(runs.read(self.folder) or {}) or 0.0
        for path in left_over(self.folder):
            path.unlink(missing_ok=True)
        self._settings(as_begun=self._as_begun())
        lines.truncate(_end_of(self.folder / METRICS_FILE, step, scored))
        before = document(self.folder / ENVIRONMENT_FILE) or {}
        resumed = [*before.get("resumed", ()), {"step": step, **environment.of_a_run()}]
        self._json(ENVIRONMENT_FILE, before | {"resumed": resumed})
        self.status("running")

    def status(self, status: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = runs.read(self.folder) or {
            "started_at": now,
            "detrcli": __version__,
            "torch": torch.__version__,
        }
        seconds = round(self._before + time.monotonic() - self._since, 1)
        ended = {} if status == "running" else {"finished_at": now}
        if not ended:  # how it ended before is no longer so
            before = {name: value for name, value in before.items() if name not in ("finished_at", "error")}
        self._json(
            runs.RUN_FILE,
            before
            | {"status": status, "model": self.plan.model, "data": self.plan.data, "seconds": seconds}
            | ended
            | facts,
        )
        if ended:
            self._last_report()

    def log(self, line: Mapping[str, float]) -> None:
        """A line that cannot be written is missing; that ends no training. What is not finite, for which JSON has no number, is null."""
        assert self._lines is not None
        plain = {name: value if math.isfinite(value) else None for name, value in line.items()}
        try:
            self._lines.write(f"{json.dumps(plain)}\n".encode())
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written: %s", METRICS_FILE, error.strerror or error)
            self._warned = True

    def close(self) -> None:
        """Let go of the metrics, which also tells others that nobody trains here any more."""
        if self._lines is not None:
            self._lines.close()

    def _open(self) -> IO[bytes]:
        path = self.folder / METRICS_FILE
        try:
            self._lines = path.open("ab", buffering=0)
        except OSError as error:
            raise DetrError(f"cannot write {path}: {error.strerror or error}") from error
        lock.take(self._lines, self.folder)
        return self._lines

    def _last_report(self) -> None:
        try:
            refresh(self.folder)
        except Exception as error:  # the weights are there; a page about them may be missing
            log.warning("the report of the run was not written: %s", error)

    def weights(self, name: str, state: Mapping[str, Tensor], **made: Any) -> None:
        variant = resolve(self.plan.model).variant
        metadata = Metadata(
            model=self.plan.model,
            num_classes=len(self.categories),
            config=to_plain(self.plan.config),
            preprocess=variant.preprocess,
            categories=self.categories,
            made={"data": runs.data_name(self.plan.data), "detrcli": __version__, **made},
        )
        file.save(self.folder / name, state, metadata)

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.folder / name) as temporary:
            text = printable(json.dumps(content, indent=1, ensure_ascii=False))
            temporary.write_text(text + "\n", encoding="utf-8")


def _end_of(path: Path, step: int, scored: int) -> int:
    """Where the lines end that a run at `step` has behind it: whole lines of steps before it, and of evaluations up to it."""
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            row = table(line) or {}
            at = row.get("step")
            beyond = isinstance(at, int) and (at >= step if "loss" in row else at > scored)
            if beyond or not line.endswith(b"\n"):
                break
            end += len(line)
    return end


def read_plan(folder: Path) -> Plan:
    """The plan of a run; one from before they were written whole has paths from the folder it was started in."""
    try:
        return settings.plan(folder / CONFIG_FILE).anywhere()
    except UsageError as error:
        raise CheckpointError(
            f"{folder} is no training run that can be resumed: {error}",
            hint="name the folder that `detr train` printed, with its files as they were written",
        ) from error
