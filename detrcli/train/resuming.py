"""Going on where a run stopped: which run, with which settings, from which state."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from detrcli import distributed, runs
from detrcli.data.places import anywhere
from detrcli.errors import CheckpointError, DataError, UsageError, typed, unknown
from detrcli.files import left_over
from detrcli.nn.inference import choose_device
from detrcli.report import CURVES_FILE, PAGE_FILE
from detrcli.report.tables import EVALUATIONS_FILE, STEPS_FILE
from detrcli.runs import lock
from detrcli.runs.history import METRICS_FILE
from detrcli.runs.run import CONFIG_FILE, ENVIRONMENT_FILE, RUN_FILE
from detrcli.train import state
from detrcli.train.job import Job
from detrcli.train.loggers import REMEMBERED
from detrcli.train.plan import HARMLESS, Plan, Request, changed, differences, make_plan
from detrcli.train.record import read_plan
from detrcli.weights.warm import starting_from

AUTO = "auto"
# what there may be in a run's folder before its first state
_EARLY = {
    METRICS_FILE, CONFIG_FILE, ENVIRONMENT_FILE, RUN_FILE, PAGE_FILE, CURVES_FILE, STEPS_FILE, EVALUATIONS_FILE,
    REMEMBERED, "tensorboard", "wandb",
}  # fmt: skip
_BUILT_IN = (
    "model",
    "lr_factors",
    "freeze",
    "weights",
)  # the state is of this very model and optimiser


def find(resume: str | Path, request: Request, out: Path | None) -> Path | None:
    """The run to go on with; with `auto` that of `--out`, else the newest unfinished one of the same data and model, if any."""
    if str(resume) != AUTO:
        return Path(resume) if Path(resume).exists() else runs.find(str(resume)).folder
    if out is not None:
        return out if state.exists(out) else None
    model = starting_from(request.model, request.weights).name if request.model else None
    found = [
        run
        for run in runs.root("train").glob("*")
        if state.exists(run) and _is_meant(run, request.data or None, model)
    ]
    return max(found, key=lambda run: (run / "run.json").stat().st_mtime, default=None)


def clear(out: Path) -> None:
    """Take away what a run left that ended before it had a state, so that the same command begins anew there, as a scheduler
    expects. A folder with anything else in it, weights among them, is left as it is."""
    mark = out / METRICS_FILE  # the first file of every run
    if not mark.is_file() or lock.held(mark):
        return
    with suppress(OSError), mark.open("r+b", buffering=0) as file:
        lock.take(file, out)
        entries = [path for path in out.iterdir() if path != mark]
        foreign = [path for path in entries if path.name not in _EARLY and path not in left_over(out)]
        if foreign or (runs.read(out) or {}).get("status") == "finished":
            return
        for path in entries:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        mark.unlink()  # last, and still held: who waits for it sees that it has gone


def _is_meant(run: Path, data: str | None, model: str | None) -> bool:
    about = runs.read(run)
    return (
        about is not None
        and (data is None or anywhere(data) == anywhere(str(about.get("data"))))
        and model in (None, about.get("model"))
        and about.get("status") != "finished"
    )


def planned(
    request: Request, out: Path | None, resume: str | Path | None, allow: Sequence[str]
) -> tuple[Plan, Path | None]:
    """What is to be done, and the run that is to go on with it, if one is; rank 0 looks for it."""
    if resume is None and allow:
        raise UsageError("--allow-change is for a run that goes on", hint="name it: --resume RUN, or auto")
    if resume is not None and str(resume) != AUTO and out is not None:
        raise UsageError(
            f"{resume} goes on where it is, not in {out}",
            hint="leave --out out; with --resume auto it names the run to go on with, or to begin",
        )
    found = find(resume, request, out) if resume is not None and distributed.is_main() else None
    folder = distributed.from_main(found)
    if folder is not None:
        return plan_of(folder, request, allow), folder
    plan = make_plan(request)
    _check_names(allow, plan)
    return plan, None


def plan_of(folder: Path, request: Request, allow: Sequence[str]) -> Plan:
    """The plan that the run was started with; what the request says otherwise must be among the changes allowed."""
    stored = read_plan(folder)
    _check_names(allow, stored)
    plan = changed(stored, request)
    allowed = {_as_written(name) for name in allow} | HARMLESS
    for name, (before, after) in differences(stored, plan).items():
        _refuse(folder, name, before, after, allowed=name in allowed)
    _check_device(folder, plan.device)
    return plan


def _check_names(allow: Sequence[str], plan: Plan) -> None:
    known = {name.removeprefix("recipe.") for name in plan.settings()}
    for name in allow:
        if _as_written(name) not in known:
            raise unknown("setting in --allow-change", name, known)


def _as_written(name: str) -> str:
    """The name of a setting as a plan has it, of a flag too: batch-size."""
    return name.removeprefix("--").replace("-", "_")


def _check_device(folder: Path, device: str) -> None:
    """The run's device may be one of another machine."""
    try:
        choose_device(device)
    except UsageError as error:
        raise UsageError(
            f"{folder} was trained on {device}: {error.message}",
            hint="go on elsewhere knowingly: --device cpu --allow-change device",
        ) from error


def _refuse(folder: Path, name: str, before: Any, after: Any, *, allowed: bool) -> None:
    if name.startswith(_BUILT_IN):
        raise UsageError(
            f"{folder} was started with {name} = {before}, which cannot become {after} on the way",
            hint=f"start a new run from its weights: {typed('--weights', folder)}",
        )
    if not allowed:
        raise UsageError(
            f"{folder} was started with {name} = {before}, and {after} was asked for now",
            hint=f"leave it out, or change it knowingly: --allow-change {name}",
        )


def restore(job: Job, folder: Path, allow: Sequence[str]) -> None:
    """Take up the state of a run: what comes next is what would have come."""
    kept, job.fell_back = state.newest(folder)
    _check_data(job, folder, kept, allowed="data" in allow)
    trainer = job.trainer
    try:
        job.net.load_state_dict(kept["model"])
        groups = trainer.optimizer.state_dict()["param_groups"]  # the rates are the plan's, not the file's
        trainer.optimizer.load_state_dict({"state": kept["optimizer"], "param_groups": groups})
        if job.average is not None:
            job.average.load(kept["average"] or job.net.state_dict())
        if kept["scaler"]:  # empty unless it was fp16: then the scale begins anew
            trainer.scaler.load_state_dict(kept["scaler"])
        job.step, job.scored, job.best, job.stale = (kept[n] for n in ("step", "scored", "best", "stale"))
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the state in {folder} is of another model: {str(error).splitlines()[0]}",
            hint=f"start a new run from its weights: {typed('--weights', folder)}",
        ) from error
    job.notes.append(f"resumed at step {job.step} of {job.steps}")
    job.notes += _about_machine(kept["machine"])


def _check_data(job: Job, folder: Path, kept: dict[str, Any], *, allowed: bool) -> None:
    """The data must be what the run has learned from so far. A state from before this was kept says nothing of it."""
    classes, data = kept.get("classes"), kept.get("data", job.data)
    if classes not in (None, _classes(job)):
        raise DataError(
            f"{folder} has learned other classes than {job.plan.data} has now",
            hint=f"start a new run from its weights: {typed('--weights', folder)}",
        )
    changed = [split for split in data | job.data if data.get(split) != job.data.get(split)]
    if changed and not allowed:
        raise DataError(
            f"{' and '.join(changed)} of {job.plan.data} have other pictures, objects or classes than when {folder} was saved",
            hint="bring them back, or go on with them knowingly: --allow-change data",
        )


def _classes(job: Job) -> list[list[Any]]:
    return [list(job.categories.ids), list(job.categories.names)]


def content(job: Job) -> dict[str, Any]:
    """Everything the next step depends on."""
    return {
        "model": job.net.state_dict(),
        "optimizer": job.trainer.optimizer.state_dict()["state"],
        "average": None if job.average is None else job.average.state(),
        "scaler": job.trainer.scaler.state_dict(),
        "step": job.step,
        "scored": job.scored,
        "best": job.best,
        "stale": job.stale,
        "classes": _classes(job),
        "data": job.data,
        "machine": _machine(),
    }


def _machine() -> dict[str, Any]:
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "devices": distributed.world_size(),
    }


def _about_machine(before: dict[str, Any]) -> list[str]:
    """What makes the numbers differ in their last digits from those of an unbroken run."""
    now = _machine()
    other = [f"{name} {before[name]} then, {now[name]} now" for name in now if before.get(name) != now[name]]
    return [f"not to the bit: {', '.join(other)}"] if other else []
