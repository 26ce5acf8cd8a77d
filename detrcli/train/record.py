"""What a training run leaves behind.

run.json            what it is: status, model, data, best score, when            (rewritten whole)
plan.json           every setting, resolved                                       (written once)
metrics.jsonl       one line a step that was logged, one a evaluation             (appended)
best.safetensors    the weights that scored best, with classes and preprocessing
last.safetensors    the newest weights
state.pt            what `--resume` continues from
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detrcli import runs
from detrcli.config import to_plain
from detrcli.errors import CheckpointError
from detrcli.files import replacing
from detrcli.plugins import resolve
from detrcli.train.plan import Plan
from detrcli.types import Categories
from detrcli.version import __version__
from detrcli.weights import file
from detrcli.weights.metadata import Metadata

STATE = "state.pt"


@dataclass(slots=True)
class Record:
    """The files of one run, written by rank 0 only."""

    folder: Path
    plan: Plan
    categories: Categories

    def start(self) -> None:
        self._json("plan.json", self.plan.to_plain())
        self.status("running")

    def status(self, status: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = runs.read(self.folder) or {
            "started_at": now,
            "detrcli": __version__,
            "torch": torch.__version__,
        }
        ended = {} if status == "running" else {"finished_at": now}
        self._json(
            runs.RUN_FILE,
            before | {"status": status, "model": self.plan.model, "data": self.plan.data} | ended | facts,
        )

    def log(self, line: Mapping[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def weights(self, name: str, state: Mapping[str, Tensor], **made: Any) -> None:
        variant = resolve(self.plan.model).variant
        metadata = Metadata(
            model=self.plan.model,
            num_classes=len(self.categories),
            config=to_plain(self.plan.config),
            preprocess=variant.preprocess,
            categories=self.categories,
            made={"data": self.plan.data, "detrcli": __version__, **made},
        )
        file.save(self.folder / name, state, metadata)

    def state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, best: float | None
    ) -> None:
        """Everything the next step depends on; randomness is counted from the step, so no generator is among it."""
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "best": best,
        }
        with replacing(self.folder / STATE) as temporary:
            torch.save(content, temporary)

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_plan(folder: Path) -> Plan:
    try:
        return Plan.from_plain(json.loads((folder / "plan.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no training run that can be resumed: {error}",
            hint="name the folder that `detr train` printed",
        ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """The state of an interrupted run; only tensors and plain values are ever built from the file."""
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            hint=f"start anew from its weights: --weights {folder / 'last.safetensors'}",
        ) from error
    return state
