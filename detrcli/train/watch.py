"""Who is told how a run goes: the caller's watcher, the run's own report, and the loggers that were asked for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from detrcli import distributed, runs
from detrcli.evaluate.run import EvalResult
from detrcli.report import refresh
from detrcli.runs import Run
from detrcli.train import loggers, samples
from detrcli.train.loop import Step

if TYPE_CHECKING:
    from detrcli.train.job import Job

log = logging.getLogger(__name__)
SHARE, FREE = 0.02, 2.0  # of the run's time may go into reports; so many seconds in any case
EVERY = 10  # steps between two that loggers are told of


class Watcher(Protocol):
    """Who wants to know how it goes: a terminal, a test, a notebook."""

    def begins(self, job: Job) -> None: ...
    def step(self, step: Step) -> None: ...
    def evaluated(self, step: int, result: EvalResult, best: bool) -> None: ...
    def ended(self) -> None: ...


@dataclass(slots=True)
class Audience:
    """All watchers of a run as one. The caller's may end the run by raising; those of the record may not."""

    watcher: Watcher | None
    records: dict[str, Watcher] = field(default_factory=dict)

    def begins(self, job: Job) -> None:
        """Loggers first: what keeps one from starting is told before anything is drawn."""
        if not distributed.is_main():
            self.watcher = None
            return
        watcher, self.watcher = self.watcher, None
        wanted: dict[str, Watcher] = {"report": Report()} | {name: Logging(name) for name in job.plan.log}
        for name, one in wanted.items():
            one.begins(job)
            self.records[name] = one
        if watcher:
            watcher.begins(job)
            self.watcher = watcher

    def step(self, step: Step) -> None:
        self._tell("step", step)

    def evaluated(self, step: int, result: EvalResult, best: bool) -> None:
        self._tell("evaluated", step, result, best)

    def evaluating(self, images: int) -> Callable[[int], None] | None:
        """Told that an evaluation begins; what it returns is told after each batch how many images were done."""
        begins = getattr(self.watcher, "evaluating", None)
        return begins(images) if begins else None

    def ended(self) -> None:
        self._tell("ended")

    def _tell(self, event: str, *what: Any) -> None:
        if self.watcher:
            getattr(self.watcher, event)(*what)
        for name, one in list(self.records.items()):
            try:
                getattr(one, event)(*what)
            except Exception as error:  # whatever a recorder meets, the training is worth more
                log.warning("%s failed and is left out from here on: %s", name, loggers.reason(error))
                del self.records[name]


@dataclass(slots=True)
class Report:
    """The derived files of a run: score in run.json, samples, tables, curves, page."""

    job: Job | None = None
    started: float = 0.0
    spent: float = 0.0

    def begins(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()

    def step(self, step: Step) -> None: ...

    def evaluated(self, step: int, result: EvalResult, best: bool) -> None:
        """A report at the last evaluation, and at every other unless reports took more than their share of the time."""
        job, now = self.job, time.monotonic()
        assert job is not None
        job.record.status("running", step=step, best_ap=job.best, metrics=result.metrics)
        if not job.over and self.spent > max(FREE, SHARE * (now - self.started)):
            return
        if job.val is not None:
            samples.write(job.record.folder, job.val, result.detections, step)
        if not job.over:  # the last one is made when the run has ended
            refresh(job.record.folder)
        self.spent += time.monotonic() - now

    def ended(self) -> None: ...


@dataclass(slots=True)
class Logging:
    """One of the loggers, told the mean of every few steps, and every evaluation."""

    name: Any
    job: Job | None = None
    sink: loggers.Sink | None = None
    waiting: list[dict[str, float]] = field(default_factory=list)

    def begins(self, job: Job) -> None:
        folder = job.record.folder
        settings = Run(folder, "running", {}).settings()
        self.job, self.sink = job, loggers.start(self.name, folder, settings, job.step)

    def step(self, step: Step) -> None:
        terms = {f"train/{name}": value for name, value in step.terms.items()}
        self.waiting.append(
            {"train/loss": step.loss, **terms, "train/lr": step.lr, "train/grad_norm": step.grad_norm}
            | {"time/step": step.seconds, "time/waited": step.waited}
        )
        if (step.number + 1) % EVERY == 0:
            self._send(step.number + 1)

    def evaluated(self, step: int, result: EvalResult, best: bool) -> None:
        self._send(step, {f"val/{name}": value for name, value in result.metrics.items() if value >= 0})

    def ended(self) -> None:
        assert self.sink is not None
        assert self.job is not None
        said = runs.read(self.job.record.folder) or {}
        status = "finished" if self.job.over else "interrupted"
        with suppress(Exception):
            self._send(self.job.step)
        self.sink.close("failed" if said.get("status") == "failed" else status)

    def _send(self, step: int, more: Mapping[str, float] | None = None) -> None:
        assert self.sink is not None
        means = {
            name: sum(finite) / len(finite)
            for name in (self.waiting[0] if self.waiting else ())
            if all(name in row for row in self.waiting)
            # a gradient that overflowed in 16 bits has no norm
            if (finite := [row[name] for row in self.waiting if math.isfinite(row[name])])
        }
        self.waiting.clear()
        if values := {**means, **(more or {})}:
            self.sink.scalars(step, values)
