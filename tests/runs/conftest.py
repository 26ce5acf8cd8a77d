"""A real run, trained once, and a folder of runs to put copies and forgeries into."""

from __future__ import annotations

import json
import shutil

import pytest

from detrcli import runs
from detrcli.data.shapes import write_shapes
from detrcli.train.plan import Request
from detrcli.train.run import train


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toys"
    write_shapes(folder, "easy", train=20, val=6)
    return folder


@pytest.fixture(scope="session")
def trained(toys, tmp_path_factory):
    """A finished run of ten steps with two evaluations."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    request = Request(data=str(toys), model="detr/tiny", batch_size=4, epochs=2, device="cpu")
    return train(request, out=folder).folder


@pytest.fixture
def place():
    """The folder of runs of this test."""
    folder = runs.root("train")
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def copy(trained, place):
    """Copies of the trained run under other names."""

    def make(name, **said):
        folder = shutil.copytree(trained, place / name)
        about = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(about | said))
        return folder

    return make
