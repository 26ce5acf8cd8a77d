"""`detr train`: from data and a model's name to a run folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrcli.cli import console
from detrcli.cli.complete import data_names, model_names

if TYPE_CHECKING:
    from detrcli.evaluate.run import EvalResult
    from detrcli.train.loop import Step
    from detrcli.train.plan import Plan
    from detrcli.train.run import Job, RunResult


def train(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A name (shapes, coco), a folder or an annotation file.", autocompletion=data_names
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="FAMILY or FAMILY/VARIANT, see `detr zoo list`.", autocompletion=model_names
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Picks the recipe nearest to it [default: the recipe's].")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures a step, over everything [default: the recipe's].")
    ] = None,
    device_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures at once on a device; the rest of the batch is accumulated."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Base learning rate [default: the recipe's].")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Start from a file, a run or OWNER/REPO; classes may differ.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run, exactly.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps [default: the fastest].")] = None,
    amp: Annotated[str | None, typer.Option(help="bf16 or off [default: bf16 on CUDA].")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="Epochs between evaluations.")] = 1,
    data_root: Annotated[Path | None, typer.Option(help="Where named data sets are.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder [default: runs/train/MODEL-DATA-N].")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="model.PATH=VALUE or recipe.PATH=VALUE.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON document on stdout.")
    ] = False,
) -> None:
    """Train a model."""
    console.settings.json = as_json
    if resume is not None:
        _refuse_with_resume(data, model)
        from detrcli.train.run import resume as go_on

        _finish(go_on(resume, watch=_Screen()), as_json)
        return
    from detrcli.config import parse_assignments
    from detrcli.errors import UsageError
    from detrcli.plugins import resolve

    if data is None or model is None:
        raise UsageError(
            "train needs data and a model", hint="for example: detr train shapes --model detr/tiny"
        )
    if amp not in (None, "off", "bf16"):
        raise UsageError(f"unknown --amp {amp!r}", hint="known: bf16, off")
    resolve(model)  # a wrong name is told before torch is loaded
    changes = parse_assignments(set_ or [])
    from detrcli.train.plan import Request
    from detrcli.train.run import train as run

    request = Request(
        data=data,
        model=model,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        device_batch=device_batch,
        lr=lr,
        weights=weights,
        device=device,
        amp="bf16" if amp == "bf16" else "off" if amp else None,
        seed=seed,
        workers=workers,
        eval_every=eval_every,
        data_root=str(data_root) if data_root else None,
        changes=changes,
    )
    _finish(run(request, out=out, watch=_Screen()), as_json)


def _refuse_with_resume(data: str | None, model: str | None) -> None:
    from detrcli.errors import UsageError

    if data is not None or model is not None:
        raise UsageError(
            "a resumed run keeps its data, model and settings",
            hint="give --resume RUN alone, or start anew with --weights RUN",
        )


def _finish(result: RunResult, as_json: bool) -> None:
    if as_json:
        best = {"best_ap": result.best, "metrics": result.metrics}
        console.emit_json(
            {"run": str(result.folder), "steps": result.steps, "stopped_by": result.stopped_by, **best}
        )
    elif result.stopped_by:
        console.note(f"stopped and saved; go on with: detr train --resume {result.folder}")
    else:
        score = "" if result.best is None else f"best AP {result.best:.3f} · "
        console.note(f"{score}{result.folder}")
        console.note(f"next: detr predict IMAGE --weights {result.folder}")
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)


@dataclass(slots=True)
class _Screen:
    """Progress for people: a bar on a terminal, a line now and then elsewhere, a line for each evaluation."""

    bar: Any = None
    ticker: console.Ticker | None = None

    def begins(self, job: Job) -> None:
        for line in describe(job.plan, job.steps_per_epoch, job.steps):
            console.note(line)
        for line in job.notes:
            console.note(line)
        self.bar = console.progress("training", job.steps, done=job.step)
        self.ticker = self.bar.__enter__()

    def step(self, step: Step) -> None:
        if self.ticker is not None:
            self.ticker.tell(f"loss {step.loss:.3f}")
            self.ticker.advance()

    def evaluated(self, step: int, result: EvalResult, best: bool) -> None:
        m = result.metrics
        console.note(f"step {step}: AP {m['ap']:.3f}  AP50 {m['ap50']:.3f}{'  (best)' if best else ''}")

    def ended(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)


def describe(plan: Plan, steps_per_epoch: int, steps: int) -> list[str]:
    """What a run is going to do, in three lines."""
    recipe = plan.recipe
    parts = f" in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    precision = "" if plan.amp == "off" else f", {plan.amp}"
    return [
        f"training {plan.model} on {plan.data} ({plan.device}{precision}, seed {plan.seed})",
        f"recipe: {recipe.epochs} epochs, {steps} steps of {recipe.batch_size}{parts}, lr {recipe.lr:g}, "
        f"{recipe.schedule} schedule ({recipe.source})",
    ]
