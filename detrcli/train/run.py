"""`train`: from a request to a finished run folder; and `resume`, which goes on where a run stopped, to the bit."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from detrcli import distributed, runs
from detrcli.data import catalog
from detrcli.data.annotations import Dataset
from detrcli.data.loader import Batches, train_loader
from detrcli.data.masks import without_outline
from detrcli.data.transforms import training
from detrcli.errors import DataError, DetrError
from detrcli.evaluate.run import EvalResult, evaluate
from detrcli.nn.backbone import Backbone
from detrcli.nn.speed import keep_memory, levers
from detrcli.plugins import Model, resolve
from detrcli.train.loop import Step, Trainer
from detrcli.train.optim import build_optimizer, rate_at
from detrcli.train.plan import Plan, Request, make_plan
from detrcli.train.record import Record, read_plan, read_state
from detrcli.types import Batch
from detrcli.weights.warm import told, warm_start


class Watcher(Protocol):
    """Who wants to know how it goes: a terminal, a test, a notebook."""

    def begins(self, job: Job) -> None: ...
    def step(self, step: Step) -> None: ...
    def evaluated(self, step: int, result: EvalResult, best: bool) -> None: ...
    def ended(self) -> None: ...


@dataclass(slots=True)
class Job:
    """A run that is ready to start."""

    plan: Plan
    model: Model
    net: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Batches
    val: Dataset | None
    record: Record
    notes: list[str] = field(default_factory=list)
    step: int = 0  # the next one
    best: float | None = None

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.loader) // self.plan.accumulate)

    @property
    def steps(self) -> int:
        whole = self.plan.recipe.epochs * self.steps_per_epoch
        return whole if self.plan.steps is None else min(whole, self.plan.steps)


@dataclass(frozen=True, slots=True)
class RunResult:
    folder: Path
    steps: int
    metrics: dict[str, float]  # of the last evaluation
    best: float | None  # the best AP
    stopped_by: int | None = None  # the signal that ended it early


def train(request: Request, *, out: Path | None = None, watch: Watcher | None = None) -> RunResult:
    """Train as the request says, into a new run folder."""
    plan = make_plan(request)
    torch.manual_seed(plan.seed)
    job = _prepare(plan, lambda: runs.new_run("train", f"{plan.model}-{Path(plan.data).stem}", out))
    job.notes += _initialise(job)
    job.record.start()
    return _run(job, watch)


def resume(folder: Path, *, watch: Watcher | None = None) -> RunResult:
    """Go on with an interrupted run, with the plan it was started with."""
    job = _prepare(read_plan(folder), lambda: folder)
    state = read_state(folder)
    job.net.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.step, job.best = state["step"], state["best"]
    job.notes.append(f"resumed at step {job.step} of {job.steps}")
    job.record.status("running")
    return _run(job, watch)


def _prepare(plan: Plan, folder: Callable[[], Path]) -> Job:
    """Everything a run needs; the folder is asked for last, so that a mistake leaves none behind."""
    model = resolve(plan.model).configured(plan.config)
    root = Path(plan.data_root) if plan.data_root else None
    masks = "masks" in model.family.needs(model.config)
    source = catalog.find(plan.data, root)
    dataset = catalog.resolve(plan.data, "train", root, masks=masks)
    val = catalog.resolve(plan.data, "val", root) if "val" in source.splits else None
    if len(dataset) == 0:
        raise DataError(
            f"{plan.data} has no training pictures", hint=f"look at it: detr data info {plan.data}"
        )
    loader = train_loader(
        dataset,
        training(plan.recipe.augment, model.variant.preprocess),
        batch_size=min(plan.device_batch, len(dataset)),
        seed=plan.seed,
        workers=plan.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        pin_memory=plan.device.startswith("cuda"),
    )
    if plan.device == "cpu" and "allocator" in levers():
        keep_memory()
    net = model.build(len(dataset.categories)).to(plan.device)
    record = Record(folder(), plan, dataset.categories)
    job = Job(plan, model, net, build_optimizer(net, plan.recipe), loader, val, record)
    if masks:
        job.notes += _about_masks(dataset)
    if val is None:
        job.notes.append("no validation split: nothing is scored, the last weights count as the best")
    return job


def _about_masks(dataset: Dataset) -> list[str]:
    boxed = without_outline(dataset.annotations)
    if boxed == 0:
        return []
    return [
        f"{boxed} of {len(dataset.annotations.ids)} objects have no segmentation: their masks are their boxes"
    ]


def _initialise(job: Job) -> list[str]:
    """Starting weights: a checkpoint if named, else ImageNet's for the backbone if the variant has some."""
    if job.plan.weights:
        report = warm_start(job.net, job.plan.weights, job.model, classes=job.record.categories)
        taken, *rest = told(report)
        return [f"weights from {job.plan.weights}: {taken}", *rest]
    for module in job.net.modules():
        if isinstance(module, Backbone) and module.config.pretrained:
            module.load_pretrained()
            return [f"backbone starts from {module.config.starts_from}"]
    return ["all weights start from nothing"]


def _run(job: Job, watch: Watcher | None) -> RunResult:
    family, plan = job.model.family, job.plan
    trainer = Trainer(
        model=job.net,
        criterion=family.build_criterion(plan.config, len(job.record.categories)),
        optimizer=job.optimizer,
        recipe=plan.recipe,
        device=plan.device,
        seed=plan.seed,
        bf16=plan.amp == "bf16",
        takes_targets=family.takes_targets,
    )
    if watch:
        watch.begins(job)
    metrics: dict[str, float] = {}
    with _signals() as stopped:
        try:
            for step in _steps(job, trainer):
                job.record.log(
                    {"step": step.number, "epoch": step.epoch, "loss": step.loss, "lr": step.lr, **step.terms}
                )
                if watch:
                    watch.step(step)
                if job.step % job.steps_per_epoch == 0 or job.step == job.steps:
                    metrics = _end_of_epoch(job, watch) or metrics
                if stopped():
                    break
        except DetrError as error:
            job.record.status("failed", error=error.message)
            raise
        finally:
            if watch:
                watch.ended()
    return _finish(job, metrics, stopped())


def _steps(job: Job, trainer: Trainer) -> Iterator[Step]:
    """Every step that is left, epoch after epoch."""
    job.net.train()
    while job.step < job.steps:
        epoch, start = divmod(job.step, job.steps_per_epoch)
        batches = job.loader.epoch(epoch, start=start * job.plan.accumulate)
        left = min(job.steps_per_epoch - start, job.steps - job.step)
        for _ in range(left):
            parts: list[Batch] = list(itertools.islice(batches, job.plan.accumulate))
            share = rate_at(job.step, job.plan.recipe, job.steps_per_epoch, job.steps)
            step = trainer.step(parts, job.step, epoch, share)
            job.step += 1
            yield step


def _end_of_epoch(job: Job, watch: Watcher | None) -> dict[str, float]:
    """Score if it is time to, and save."""
    last = job.step == job.steps
    epoch = job.step // job.steps_per_epoch
    metrics: dict[str, float] = {}
    if job.val is not None and (last or epoch % job.plan.eval_every == 0):
        result = evaluate(
            job.net,
            job.val,
            preprocess=job.model.variant.preprocess,
            postprocess=job.model.postprocess,
            device=job.plan.device,
            batch_size=job.model.family.eval_batch_size(job.plan.config) or job.plan.device_batch,
            amp=job.plan.amp == "bf16",
        )
        metrics = result.metrics
        better = job.best is None or metrics["ap"] > job.best
        job.record.log({"step": job.step, "epoch": epoch, **metrics})
        if better:
            job.best = metrics["ap"]
            job.record.weights("best.safetensors", job.net.state_dict(), step=job.step, metrics=metrics)
        if watch:
            watch.evaluated(job.step, result, better)
    elif last and job.val is None:
        job.record.weights("best.safetensors", job.net.state_dict(), step=job.step)
    _save(job)
    return metrics


def _save(job: Job) -> None:
    job.record.weights("last.safetensors", job.net.state_dict(), step=job.step)
    job.record.state(job.net, job.optimizer, job.step, job.best)


def _finish(job: Job, metrics: dict[str, float], stopped_by: int | None) -> RunResult:
    done = job.step >= job.steps
    if not done:
        _save(job)
    job.record.status("finished" if done else "interrupted", step=job.step, best_ap=job.best, metrics=metrics)
    return RunResult(job.record.folder, job.step, metrics, job.best, None if done else stopped_by)


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """SIGINT and SIGTERM end the run after the step at hand; a second one ends it at once."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)

    before: dict[signal.Signals, Any] = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, note)
    except ValueError:  # not the main thread: signals are somebody else's
        before.clear()
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
