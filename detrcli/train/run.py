"""`train`: from a request to a finished run folder, new or resumed, on one device or on several."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrcli import distributed, launch, runs
from detrcli.errors import DetrError, NonFiniteError, typed
from detrcli.evaluate.run import evaluate
from detrcli.train import loggers, resuming, state
from detrcli.train.estimate import with_largest_batch
from detrcli.train.guard import MemoryShortError, of_evaluation
from detrcli.train.job import Job, assemble
from detrcli.train.loop import Step
from detrcli.train.machine import enough_room
from detrcli.train.optim import rate_at
from detrcli.train.plan import Plan, Request, make_plan
from detrcli.train.record import Record
from detrcli.train.signals import Noted, noted
from detrcli.train.watch import Audience, Watcher

SAVING = 0.05  # of the time may go into states at the ends of epochs that are not scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunResult:
    folder: Path
    steps: int
    metrics: dict[str, float]  # of the last evaluation
    best: float | None  # the best AP
    stopped_by: int | None = None  # the signal that ended it early
    because: str | None = None  # why it ended before its last step, or had nothing to do


def train(
    request: Request,
    *,
    out: Path | None = None,
    resume: str | Path | None = None,
    allow_change: Sequence[str] = (),
    devices: int = 1,
    auto_batch: bool = False,
    watch: Watcher | None = None,
) -> RunResult:
    """Train as the request says, into a new run folder; or go on with a run, `"auto"` being the newest unfinished one.

    With `auto_batch` the largest `device_batch` is taken that fits, whatever the request or the run say.
    With `devices` on so many processes of this machine; `watch` then travels to the first of them. Where torchrun or SLURM
    has started several processes, each calls this and gets the result.
    """
    arguments = (request, out, resume, tuple(allow_change), auto_batch, watch)
    launch.processes(devices)
    if devices > 1:
        launch.check(devices, request.device)
        if resume is None:  # what cannot be shared is told before processes start
            plan = make_plan(request)
            plan.parts(devices)
            launch.check(devices, plan.device)
        return launch.on_ranks(devices, _train, *arguments)
    with launch.joined():
        return _train(*arguments)


def _train(
    request: Request,
    out: Path | None,
    resume: str | Path | None,
    allow: Sequence[str],
    auto_batch: bool,
    watch: Watcher | None,
) -> RunResult:
    main = distributed.is_main()
    plan, folder = resuming.planned(request, out, resume, allow)
    resumed = folder is not None
    loggers.check(plan.log)
    if auto_batch:
        plan = with_largest_batch(plan, distributed.world_size())
    job = assemble(plan, fresh=not resumed)
    if auto_batch:
        job.notes.append(f"--auto-batch: {plan.device_batch} pictures at once fit on a device")
    if folder:
        resuming.restore(job, folder, allow)
    if main and not job.done:
        if resume is not None and out is not None and not resumed:
            resuming.clear(out)
        enough_room(folder or out or runs.root("train"), job.net, averaged=job.average is not None)
        folder = folder or _new_folder(job.plan, out)
    folder = distributed.from_main(folder)
    assert folder is not None
    job.record = Record(folder, job.plan, job.categories)
    job.trainer.ways = replace(job.trainer.ways, run=typed(folder))
    if job.done:
        metrics = (runs.read(folder) or {}).get("metrics", {})
        more = "--epochs N --allow-change epochs" if job.plan.steps is None else "--steps N"
        complete = f"nothing was left to do at step {job.step} of {job.steps}; for more: {more}"
        return RunResult(folder, job.step, metrics, job.best, because=job.given_up or complete)
    if main:
        if resumed:
            job.record.go_on(job.step, job.scored)
        else:
            job.record.start()
    with closing(job.record):
        return Run(job, Audience(watch)).whole()


def _new_folder(plan: Plan, out: Path | None) -> Path:
    return runs.new_run("train", f"{plan.model}-{Path(plan.data).stem}", out)


@dataclass(slots=True)
class _Best:
    """The weights that scored best, until they are on the disk."""

    step: int
    scored: int  # up to where the ends of epochs were done with before
    ap: float | None
    metrics: dict[str, float]
    weights: Mapping[str, Tensor]


class _Stopped(Exception):
    """A signal came in the middle of an evaluation."""


class Run:
    """The steps of a job, with what is written and told on the way. Every rank has one; the first writes and tells."""

    def __init__(self, job: Job, audience: Audience) -> None:
        self.job, self.audience = job, audience
        self.main = distributed.is_main()
        self.metrics: dict[str, float] = {}
        self.saved_at, self.save_took = time.monotonic(), 0.0
        self.owed: _Best | None = None
        self.kept = job.best  # the score of the best weights on the disk
        self.state_step = job.step  # of the state on the disk
        self.signals = Noted()

    def whole(self) -> RunResult:
        with noted() as self.signals:
            try:
                self.audience.begins(self.job)
                signal = self._steps()
            except Exception as error:
                self._failed(error)
                raise
            finally:
                self.audience.ended()
            return self._finish(signal)

    def _steps(self) -> int | None:
        """Every step that is left, epoch after epoch, and the end of each epoch, until it is over or a signal comes: which one, to
        whichever rank it came."""
        job = self.job
        job.net.train()
        while True:
            if job.due:
                try:
                    self._end_of_epoch()
                except _Stopped:
                    return self.signals.end
            if job.over:
                return None
            for step in self._epoch():
                if self.main:
                    job.record.log(_line(step))
                self.audience.step(step)
                if signal := distributed.largest(self.signals.end or 0, torch.device(job.device)):
                    return signal
                self._save_now_and_then()

    def _epoch(self) -> Iterator[Step]:
        """What is left of the epoch at hand."""
        job = self.job
        epoch, start = divmod(job.step, job.steps_per_epoch)
        batches = job.loader.steps(epoch, start=start)
        for _ in range(min(job.steps_per_epoch - start, job.steps - job.step)):
            asked = time.perf_counter()
            parts = next(batches)
            waited = time.perf_counter() - asked
            share = rate_at(job.step, job.plan.recipe, job.steps_per_epoch)
            try:
                step = job.trainer.step(parts, job.step, epoch, share, waited)
            except (NonFiniteError, MemoryShortError):
                if self.state_step != job.step:
                    self._save()  # the step was not taken: the weights are those before it
                raise
            job.step += 1
            yield step

    def _end_of_epoch(self) -> None:
        """Score if it is time to, and save; without a score only if saving takes a small part of the time."""
        job = self.job
        last, epoch = job.step == job.steps, job.step // job.steps_per_epoch
        scoring = job.val is not None and (last or epoch % job.plan.eval_every == 0)
        if (scoring or last) and self.main and not state.exists(job.record.folder):
            self._save()  # before weights are kept: a folder with weights is one to go on with
        if scoring:
            self._score(epoch)
        elif last:
            self._owe_best()
        job.scored = job.step
        if scoring or last or time.monotonic() - self.saved_at > self.save_took / SAVING:
            self._save()

    def _score(self, epoch: int) -> None:
        job, plan = self.job, self.job.plan
        assert job.val is not None

        watched = self.audience.evaluating(len(job.val))

        def advance(done: int) -> None:
            self._hear()
            if watched:
                watched(done)

        try:
            result = evaluate(
                job.answering,
                job.val,
                preprocess=job.model.variant.preprocess,
                postprocess=job.model.postprocess,
                categories=job.categories,
                device=job.device,
                batch_size=job.model.family.eval_batch_size(plan.config) or job.loader.sampler.batch_size,
                workers=plan.workers,
                amp=plan.amp == "bf16",
                advance=advance,
            )
        except NonFiniteError as error:
            raise of_evaluation(error, job.step, good=self._good_state(), ways=job.trainer.ways) from error
        self.metrics = result.metrics
        better = job.best is None or result.metrics["ap"] > job.best
        if better:
            job.best, job.stale = result.metrics["ap"], 0
            self._owe_best()
        elif job.step % (job.steps_per_epoch * plan.eval_every) == 0:
            job.stale += 1  # where `steps` ends a run between these, patience does not count: it may go on
        if self.main:
            job.record.log({"step": job.step, "epoch": epoch, **result.metrics})
        self.audience.evaluated(job.step, result, better)

    def _hear(self) -> None:
        """Signals in the middle of an evaluation. Alone, one that ends the run ends it here. Of several ranks none can leave while the
        others wait for its answers, which may take longer than there is time: so what there is to go on from is saved now."""
        if self.signals.end and not distributed.running():
            raise _Stopped
        if (self.signals.end or self.signals.save) and self.state_step != self.job.step:
            self._save()

    def _good_state(self) -> bool:
        """Whether there is a state of other weights than those at hand, which are not; if theirs is the newest, it gives way."""
        folder = self.job.record.folder
        if self.state_step != self.job.step:
            return state.exists(folder)
        return self.main and not self.job.fell_back and state.step_back(folder)

    def _owe_best(self) -> None:
        """The weights at hand are the best: the next save writes them."""
        job = self.job
        if self.main:
            self.owed = _Best(job.step, job.scored, job.best, self.metrics, job.answering.state_dict())

    def _keep_best(self) -> None:
        """Write the best weights that are owed. Where that fails they stay so, as a copy that training does not change."""
        if (best := self.owed) is None:
            return
        try:
            self._weights("best.safetensors", best.weights, best.step, best.metrics)
        except (DetrError, OSError):
            best.weights = {name: value.to("cpu", copy=True) for name, value in best.weights.items()}
            raise
        self.owed, self.kept = None, best.ap

    def _weights(
        self, name: str, weights: Mapping[str, Tensor], step: int, metrics: dict[str, float]
    ) -> None:
        self.job.record.weights(name, weights, step=step, **({"metrics": metrics} if metrics else {}))

    def _state(self) -> dict[str, Any]:
        """What to go on from. It claims no best weights that are not on the disk: those at hand are scored again."""
        again = {"scored": self.owed.scored} if self.owed and self.owed.step == self.job.step else {}
        return resuming.content(self.job) | {"best": self.kept} | again

    def _save_now_and_then(self) -> None:
        if self.signals.save or time.monotonic() - self.saved_at > 60 * self.job.plan.save_every:
            self._save()

    def _save(self) -> None:
        """Best weights if any are owed, state and last weights. A disk that is full does not end the run; the next time may do
        better."""
        if not self.main:
            return
        job = self.job
        begun, self.signals.save = time.monotonic(), False
        job.unsaved = None
        with self._tolerated():
            self._keep_best()
        with self._tolerated():
            # the good one first: a save moves the newest over the one before it
            if job.fell_back:
                job.fell_back = not state.step_back(job.record.folder)
            state.save(job.record.folder, self._state())
            self.state_step = job.step
            self._weights("last.safetensors", job.answering.state_dict(), job.step, self.metrics)
        self.saved_at = time.monotonic()
        self.save_took = self.saved_at - begun

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except (DetrError, OSError) as error:
            if self.job.unsaved is None:
                logger.warning("%s; training goes on, and tries again", error)
            self.job.unsaved = error

    def _failed(self, error: Exception) -> None:
        if self.main:
            with self._tolerated():
                self.job.record.status("failed", error=str(error), step=self.job.step)

    def _finish(self, signal: int | None) -> RunResult:
        job = self.job
        if job.unsaved is not None or (not job.done and self.state_step != job.step):
            self._save()
        left_out = self._left_out() if job.plan.bad_data == "skip" else {}
        if self.main:
            facts = {"metrics": self.metrics} if self.metrics else {}
            missing = (
                {} if job.unsaved is None else {"error": f"not all of it could be written: {job.unsaved}"}
            )
            status = "failed" if missing else "finished" if job.done else "interrupted"
            with self._tolerated():
                job.record.status(status, step=job.step, best_ap=self.kept, **facts, **left_out, **missing)
        if job.unsaved is not None:
            raise DetrError(
                f"the run has ended, but not all of it could be written: {job.unsaved}",
                hint=f"free some space, then: {typed('detr', 'train', '--resume', job.record.folder)}",
            ) from job.unsaved
        stopped_by = None if job.done else signal
        return RunResult(job.record.folder, job.step, self.metrics, job.best, stopped_by, job.given_up)

    def _left_out(self) -> dict[str, Any]:
        """What was not learned from: pictures with the reason, and all defects of the data with what was done about them."""
        job = self.job
        before = runs.read(job.record.folder) or {}  # of the part of the run before it was resumed
        skipped: dict[str, dict[str, str]] = before.get("skipped") or {}
        splits = [split for split in (job.dataset, job.val) if split is not None]
        for split in splits:
            skipped.setdefault(split.split, {}).update(split.defects.pictures())
        for met in distributed.all_of(job.loader.skipped):
            skipped[job.dataset.split].update(met)
        return {"skipped": skipped, "defects": {split.split: split.defects.to_json() for split in splits}}


def _line(step: Step) -> dict[str, float]:
    facts = {
        "step": step.number,
        "epoch": step.epoch,
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
    }
    return facts | {"seconds": round(step.seconds, 4), "waited": round(step.waited, 4)} | step.terms
