"""Tiny models of every family, exported once a test run by the public verb, as a user would."""

from __future__ import annotations

import fcntl
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.export import ExportedProgram

import detrcli
from detrcli.export.run import Exported, shake
from tests.tiny import write_run

FAMILIES = (
    "detr",
    "deformable_detr",
    "dynamic_detr",
    "d2etr",
    "lite_deformable",
    # these take longest, and stand in test_formats.py with pictures of one size
    pytest.param("lite_dino", marks=pytest.mark.long),
    pytest.param("dino", marks=pytest.mark.long),
)

Make = Callable[..., Exported]


@pytest.fixture(scope="session")
def make(tmp_path_factory) -> Make:
    """make(family, suffix, **options): the same call gives the same file, in every process of a test run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def export(family: str, suffix: str = ".onnx", **options: Any) -> Exported:
        name = re.sub(r"\W+", "-", f"exported-{family}{suffix}-{sorted(options.items())}")
        folder = shared / name
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = folder / "made.pickle"
            if not made.exists():
                weights = write_run(folder / "run", f"{family}/tiny", shake) / "best.safetensors"
                with pytest.MonkeyPatch.context() as patch:
                    if not options.get("half"):
                        patch.setattr(ExportedProgram, "run_decompositions", _traced_again)
                    exported = detrcli.export(None, folder / f"model{suffix}", weights=weights, **options)
                made.write_bytes(pickle.dumps(exported))
            answer: Exported = pickle.loads(made.read_bytes())
            return answer

    return export


def _traced_again(*_: Any, **__: Any) -> Any:
    """No model of ours needs it in full precision; it would be most of the time of every test here."""
    raise AssertionError("the exporter traces the program again: an operator is missing in functional.py")


def weights_of(exported: Exported) -> Path:
    """The weights that a file of `make` came from."""
    return exported.file.parent / "run" / "best.safetensors"
