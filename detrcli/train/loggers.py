"""What a run tells to TensorBoard, Weights & Biases or MLflow, beside its own record.

Each is an extra. One that is not installed, or cannot start, is an error before the first step; one that fails later is left out
with a note, and the training goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from detrcli.errors import DetrError, UsageError
from detrcli.files import replacing
from detrcli.runs.reading import document
from detrcli.train.plan import Logger

REMEMBERED = "loggers.json"  # the ids under which a resumed run goes on


class Sink(Protocol):
    """Where numbers go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, status: str) -> None: ...


def check(names: tuple[Logger, ...]) -> None:
    """An error for the first package that is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"--log {name} needs the package {name}, which is not installed",
                hint=f"pip install 'detrcli[{name}]'",
            )


def start(name: Logger, folder: Path, settings: Mapping[str, Any], step: int) -> Sink:
    """The logger of that name for the run in `folder`, which goes on at `step`."""
    try:
        return _SINKS[name](folder, settings, step)
    except Exception as error:  # a logger raises whatever its service leads it to
        raise DetrError(
            f"{name} cannot start: {reason(error)}", hint=f"train without --log {name}, or {_CALM[name]}"
        ) from error


_CALM: Mapping[Logger, str] = {
    "tensorboard": "look whether the run folder can be written",
    "wandb": "log in (wandb login), or keep it on this machine: WANDB_MODE=offline",
    "mlflow": "look at MLFLOW_TRACKING_URI",
}


def reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        tensorboard: Any = import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
        if step == 0:
            text = "\n".join(f"    {path} = {value}" for path, value in settings.items())
            self._writer.add_text("settings", text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; what it is told is otherwise its own settings (WANDB_PROJECT, WANDB_MODE, …)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        wandb: Any = import_module("wandb")
        known = _remembered(folder).get("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "detrcli"),
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        _remember(folder, wandb=self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status != "failed" else 1)


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._entities: Any = import_module("mlflow.entities")
        self._client: Any = import_module("mlflow.tracking").MlflowClient()
        known = _remembered(folder).get("mlflow")
        if known:
            self._client.update_run(known, status="RUNNING")
        self._id = known or self._create(folder)
        params = [
            self._entities.Param(_mlflow_name(path), str(value)[:500]) for path, value in settings.items()
        ]
        if step == 0:
            for first in range(0, len(params), 100):  # the most that one request takes
                self._client.log_batch(self._id, params=params[first : first + 100])
        _remember(folder, mlflow=self._id)

    def _create(self, folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "detrcli")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        return str(self._client.create_run(experiment, run_name=folder.name).info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_mlflow_name(name), value, now, step) for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: str) -> None:
        ended = {"finished": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
        self._client.set_terminated(self._id, ended)


_SINKS: Mapping[Logger, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, figures and `_-./ ` in names."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)[:250]


def _remembered(folder: Path) -> dict[str, Any]:
    return document(folder / REMEMBERED) or {}


def _remember(folder: Path, **ids: str) -> None:
    with replacing(folder / REMEMBERED) as temporary:
        temporary.write_text(json.dumps(_remembered(folder) | ids) + "\n", encoding="utf-8")
