"""Benchmarks are run by hand; that what they import is still there is seen here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from detrcli import ops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a module, by its path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # some share what another one has

    def loaded(path):
        spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_it_can_be_imported(path, load):
    assert load(path).__doc__


def test_training_memory_is_that_of_the_operators_that_are_named(load):
    lite = load(BENCHMARKS / "lite.py")
    lite.SUBJECTS = {"eager": ("lite_deformable/tiny", True, "reference")}
    answered = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *call: answered.add(ops.backend("cpu").name)
    )
    try:
        with ops.use("gather"):  # what would answer if the name were not heard
            lite.training_memory("eager", (64, 64))
    finally:
        hook.remove()
    assert answered == {"reference"}
