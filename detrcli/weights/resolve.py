"""Which weights a command means: what the user named, else the newest finished run, else what the variant declares.

Nothing is downloaded here and torch is not needed; `Choice.why` is the sentence that the user is shown.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from detrcli import runs
from detrcli.errors import CheckpointError, ModelError, UsageError
from detrcli.plugins import registry
from detrcli.plugins.contract import Weights
from detrcli.plugins.registry import Model, fold
from detrcli.weights.hub import USUAL_FILES, Reference

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True, slots=True)
class Choice:
    """Weights and the model they are for: a file on this machine, or a reference to the Hub."""

    model: Model
    source: Path | Reference
    why: str
    declared: Weights | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A finished training run with a checkpoint."""

    folder: Path
    model: str
    finished_at: str

    @property
    def best(self) -> Path:
        best = self.folder / BEST
        return best if best.is_file() else self.folder / LAST


def choose(model: str | None, weights: str | None = None) -> Choice:
    """The weights that `--weights` names or, without it, the best there are for `--model FAMILY[/VARIANT]`."""
    if weights is not None:
        return _named(weights, model)
    if model is None:
        raise UsageError("neither a model nor weights were named", hint="give --model or --weights")
    wanted = _resolved(model)
    for run in finished_runs():
        with contextlib.suppress(UsageError, ModelError):  # a run of a plugin that is gone
            found = registry.resolve(run.model)
            if found.name == wanted.name or (is_family(model) and found.family.name == wanted.family.name):
                return Choice(found, run.best, f"the newest finished run of {found.name}: {run.best}")
    for declared in wanted.variant.weights:
        reference = Reference.declared(declared)
        return Choice(wanted, reference, f"the declared weights {reference}, {declared.license}", declared)
    raise ModelError(
        f"there are no weights for {wanted.name}: none trained on this machine, none declared",
        hint=f"train them (detr train DATA --model {wanted.name}), convert an official checkpoint "
        "(detr zoo convert FILE), or name a file or Hub repository with --weights",
    )


def _resolved(model: str) -> Model:
    try:
        return registry.resolve(model)
    except UsageError:
        if not Path(model).expanduser().exists():
            raise
        raise UsageError(
            f"{model} holds weights, if anything, and is not the name of a model",
            hint=f"use --weights {model}",
        ) from None


def is_family(model: str) -> bool:
    """Whether the name leaves the variant open."""
    return "/" not in model


def finished_runs() -> list[Run]:
    """Finished runs that have a checkpoint, newest first; folders that are no runs are passed over."""
    found = [run for folder in runs.root("train").glob("*") if (run := _finished(folder))]
    return sorted(found, key=lambda run: run.finished_at, reverse=True)


def _finished(folder: Path) -> Run | None:
    said = runs.read(folder)
    if said is None or said.get("status") != "finished":
        return None
    run = Run(folder, str(said.get("model")), str(said.get("finished_at")))
    return run if run.best.is_file() else None


def _named(weights: str, model: str | None) -> Choice:
    if not weights:
        raise UsageError("--weights is empty", hint="name a file, a run or a Hub repository")
    path = Path(weights).expanduser()
    run = runs.root("train") / weights
    if not path.exists() and fold(weights).count("/") == 0 and run.is_dir():
        path = run
    if path.is_dir():
        return _in_folder(path, model)
    if path.is_file():
        return Choice(_model_of(path, model), path, f"the file {path}")
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin") and ":" not in weights and "@" not in weights:
        raise CheckpointError(f"there is no file {weights}", hint="check the path")
    reference = Reference.parse(weights)
    if model is None:
        raise UsageError(f"which model is {reference}?", hint="add --model FAMILY/VARIANT")
    return Choice(registry.resolve(model), reference, f"the Hub repository {reference}")


def _in_folder(folder: Path, model: str | None) -> Choice:
    for name in (BEST, LAST, *USUAL_FILES):
        path = folder / name
        if path.is_file():
            return Choice(_model_of(path, model), path, f"{name} of {folder}")
    raise CheckpointError(f"{folder} holds no weights", hint=f"a run holds {BEST} or {LAST}")


def _model_of(path: Path, model: str | None) -> Model:
    """What the file says it is, checked against what the user says."""
    from detrcli.weights.metadata import read_metadata, sniff

    ours = path.suffix == ".safetensors" or sniff(path) == "safetensors"
    said = read_metadata(path) if ours else None
    if said is None:
        if model is None:
            raise UsageError(f"{path} does not say which model it is", hint="add --model FAMILY/VARIANT")
        wanted = registry.resolve(model)
        if is_family(model) and wanted.family.question:
            names = ", ".join(f"{wanted.family.name}/{v.name}" for v in wanted.family.variants)
            raise CheckpointError(
                f"{path} does not say {wanted.family.question}", hint=f"name the row: --model one of {names}"
            )
        return wanted
    inside = registry.resolve(said.model)
    if model is not None:
        wanted = registry.resolve(model)
        same = inside.family.name == wanted.family.name and (is_family(model) or inside.name == wanted.name)
        if not same:
            raise CheckpointError(
                f"{path} holds {inside.name}, not {wanted.name}", hint=f"use --model {inside.name}"
            )
    return inside
