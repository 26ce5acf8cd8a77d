"""Which weights of a model are on this machine; nothing is fetched, torch is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detrcli.plugins.contract import Weights
from detrcli.plugins.registry import Model
from detrcli.weights import ledger
from detrcli.weights.hub import Reference, cached
from detrcli.weights.resolve import Run, finished_runs

Kind = Literal["trained", "cached", "declared", "none"]


@dataclass(frozen=True, slots=True)
class Status:
    """The nearest weights: a run of this machine, a file in the Hub cache, a declaration, or nothing."""

    kind: Kind
    path: Path | None = None
    size: int | None = None  # bytes, where the file is here


def status(model: Model, runs: Sequence[Run] | None = None) -> Status:
    """`runs` spares looking for finished runs again when many models are asked about."""
    for run in finished_runs() if runs is None else runs:
        if run.model == model.name:
            return Status("trained", run.best, run.best.stat().st_size)
    for weights in model.variant.weights:
        path = cached(Reference.declared(weights), weights.filename)
        if path is not None:
            return Status("cached", path, path.stat().st_size)
    return Status("declared" if model.variant.weights else "none")


def pinned(weights: Weights) -> str:
    """How sure the declaration is of what it names, in words."""
    if weights.revision and weights.sha256:
        return "revision and sha256 declared"
    record = ledger.find(weights.repo, weights.revision or "main", weights.filename)
    if record:
        return f"recorded at first download: {record.commit[:12]}, sha256 {record.sha256[:12]}…"
    return "not verified by us: the first download is recorded and shown"
