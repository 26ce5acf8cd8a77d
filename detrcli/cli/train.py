"""`detr train`: from data and a model's name to a run folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrcli.cli import console
from detrcli.cli.complete import data_names, run_names
from detrcli.cli.live import Screen
from detrcli.cli.options import DataRoot, Device, Model

if TYPE_CHECKING:
    from detrcli.train.job import Job
    from detrcli.train.plan import Plan, Request
    from detrcli.train.run import RunResult


def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="A name (shapes, coco), a folder or an annotation file.", autocompletion=data_names
        ),
    ] = None,
    model: Model = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Picks the recipe nearest to it [default: the recipe's].")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps of the schedule.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures a step, over everything [default: the recipe's].")
    ] = None,
    device_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures at once on a device; the rest of the batch is accumulated."),
    ] = None,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Find the largest --device-batch that fits.")
    ] = False,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Base learning rate [default: the recipe's].")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Start from a file, a run or OWNER/REPO; classes may differ.", autocompletion=run_names
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="backbone, encoder, … or a pattern of parameter names; may be repeated."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with a run, exactly; auto: the newest unfinished one, if any.",
            autocompletion=run_names,
        ),
    ] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="A setting that may differ from the resumed run's, as lr.")
    ] = None,
    device: Device = None,
    devices: Annotated[int, typer.Option(min=1, help="Processes, one a GPU, that share each batch.")] = 1,
    amp: Annotated[str | None, typer.Option(help="bf16, fp16 or off [default: bf16 on CUDA].")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Average the weights with this decay (0.9998 is usual).")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory: compute activations twice.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the backbone; pays off after minutes.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits on a GPU, too; refuses what cannot.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that read pictures, for each device [default: 0, on a GPU up to 8]."
        ),
    ] = None,
    group_by_aspect: Annotated[
        bool, typer.Option("--group-by-aspect", help="Keep wide and tall pictures apart: less padding.")
    ] = False,
    bad_data: Annotated[str, typer.Option(help="stop at, or skip, what cannot be learned from.")] = "stop",
    eval_every: Annotated[int, typer.Option(min=1, help="Epochs between evaluations.")] = 1,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many evaluations without a better AP.")
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=0.0, help="Minutes between states, beside every epoch's end.")
    ] = 10.0,
    data_root: DataRoot = None,
    log: Annotated[
        str | None, typer.Option(help="tensorboard, wandb, mlflow: any of them, separated by commas.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings from a TOML file, such as a run's config.toml; flags win.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder [default: runs/train/MODEL-DATA-N].")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the plan, try a few steps, tell time and memory; write nothing."
        ),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="model.PATH=VALUE or recipe.PATH=VALUE.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON document on stdout.")
    ] = False,
) -> None:
    """Train a model."""
    console.settings.json = as_json
    _let_threads_sleep()
    request = _request(config, _given(context), resume)
    from detrcli import launch

    if launch.rank() > 0:  # torchrun started several: the first one talks
        console.settings.quiet, console.settings.json = True, False
    if dry_run:
        if launch.rank() > 0:
            return
        from detrcli.train.estimate import with_largest_batch
        from detrcli.train.resuming import planned

        plan, resumed = planned(request, out, resume, allow_change or ())
        share = launch.processes(devices)
        _show(with_largest_batch(plan, share) if auto_batch else plan, resumed, share, as_json)
        return
    from detrcli.train.run import train as run

    result = run(
        request,
        out=out,
        resume=resume,
        allow_change=allow_change or (),
        devices=devices,
        auto_batch=auto_batch,
        watch=Screen(describe),
    )
    if launch.rank() == 0:
        _report(result, as_json)
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)


_OURS = {"config", "resume", "allow_change", "out", "devices", "auto_batch", "dry_run", "as_json"}
_SPELLED = {"compile_": "compile", "set_": "changes"}


def _let_threads_sleep() -> None:
    """Before torch is loaded: threads that wait for each other sleep after some microseconds.

    GNU's OpenMP has them spin for milliseconds, and where others want the processors, too, the thread that they wait for is
    not let in: a step of many small operations then takes ten times as long and more.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _given(context: typer.Context) -> dict[str, Any]:
    """What was typed, by the names of a request's fields: not the defaults, which would hide a file's settings."""
    from detrcli.config import parse_assignments

    typed: dict[str, Any] = {
        _SPELLED.get(name, name): str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name not in _OURS
        and (source := context.get_parameter_source(name)) is not None
        and source.name != "DEFAULT"
    }
    if "log" in typed:
        typed["log"] = [name for name in typed["log"].split(",") if name]
    if "changes" in typed:
        typed["changes"] = parse_assignments(typed["changes"])
    return typed


def _request(config: Path | None, given: dict[str, Any], resume: str | None) -> Request:
    """The flags, over the file if there is one; a wrong model is told before torch is loaded."""
    from detrcli.config import from_plain
    from detrcli.errors import UsageError
    from detrcli.plugins import resolve

    if "model" in given:
        resolve(given["model"])
    from detrcli.train import settings
    from detrcli.train.plan import Request

    file = None if config is None else settings.read(config)
    request = from_plain(Request, given) if file is None else settings.over(file, given)
    if resume is None and not (request.data and request.model):
        raise UsageError(
            "train needs data and a model", hint="for example: detr train shapes --model detr/tiny"
        )
    return request


def _show(plan: Plan, resumed: Path | None, devices: int, as_json: bool) -> None:
    """What a run would do: every setting on stdout, what it takes and needs after it."""
    from detrcli.train.estimate import estimate

    tried = estimate(plan, devices, resumed)
    behind = f", {tried.done:,} of them done" if tried.done else ""
    facts = {
        "pictures": f"{tried.images:,} with {tried.objects:,} objects of {tried.classes} classes; {tried.val_images:,} to validate on",
        "parameters": f"{tried.parameters:,}, of which {tried.learned:,} learn",
        "batch": f"{tried.plan.recipe.batch_size} = {tried.devices} devices x {tried.at_once} at once x {tried.parts} accumulated",
        "steps": f"{tried.steps:,} in epochs of {tried.steps_per_epoch:,}{behind}",
        "time": f"{console.duration(tried.seconds)}: {tried.step_seconds:.3g} s a step, of which {tried.waited_seconds:.3g} s waited for "
        "data, without evaluations",
        "memory": f"{tried.peak_bytes / 2**30:.2f} GiB at the most, in the steps tried",
    }
    if as_json:
        from dataclasses import asdict

        measured = {name: value for name, value in asdict(tried).items() if name not in ("plan", "notes")}
        console.emit_json(
            {"plan": tried.plan.to_plain(), "seconds": tried.seconds, "notes": tried.notes, **measured}
        )
        return
    console.table(["setting", "value"], [[name, str(value)] for name, value in tried.plan.settings().items()])
    for note in tried.notes:
        console.note(note)
    console.table(["", ""], [[name, text] for name, text in facts.items()])


def _report(result: RunResult, as_json: bool) -> None:
    if as_json:
        best = {"best_ap": result.best, "metrics": result.metrics}
        console.emit_json(
            {"run": str(result.folder), "steps": result.steps, "stopped_by": result.stopped_by}
            | {"because": result.because, **best}
        )
        return
    from detrcli.errors import typed

    if result.because:
        console.note(result.because)
    score = "" if result.best is None else f"best AP {result.best:.3f} · "
    console.say(f"{score}{result.folder}")
    if result.stopped_by:
        console.note(f"stopped and saved; go on with: {typed('detr', 'train', '--resume', result.folder)}")
    else:
        console.note(f"next: {typed('detr', 'predict', 'IMAGE', '--weights', result.folder)}")


def describe(job: Job) -> list[str]:
    """What a run is going to do, in three lines."""
    from detrcli import distributed

    plan, recipe, ranks = job.plan, job.plan.recipe, distributed.world_size()
    precision = "" if plan.amp == "off" else f", {plan.amp}"
    shared = f" on {ranks} devices" if ranks > 1 else ""
    parts = plan.parts(ranks)
    at_once = (
        f", {recipe.batch_size // ranks // parts} at once and {parts} times accumulated" if parts > 1 else ""
    )
    return [
        f"training {plan.model} on {plan.data} ({plan.device}{precision}, seed {plan.seed})",
        f"recipe: {recipe.epochs} epochs, {job.steps} steps of {recipe.batch_size}{shared}{at_once}, lr {recipe.lr:g}, "
        f"{recipe.schedule} schedule ({recipe.source})",
        *job.notes,
        f"record: {job.record.folder}",
    ]
