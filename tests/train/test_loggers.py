"""Loggers with their real packages, on this machine only: what they are told, and that none of them ends a training."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from detrcli import runs
from detrcli.data.shapes import write_shapes
from detrcli.errors import UsageError
from detrcli.train import loggers
from detrcli.train.plan import Request
from detrcli.train.run import train
from detrcli.train.watch import Logging
from tests.cli.run import detr


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toys"
    write_shapes(folder, "easy", train=12, val=2)
    return folder


def request(toys, *log):
    return Request(data=str(toys), model="detr/tiny", batch_size=4, epochs=4, device="cpu", log=log)


def run(toys, folder, name, **env):
    """In a process of its own: these packages start threads, and warn."""
    done = detr(
        "-q", "train", toys, "-m", "detr/tiny", "--batch-size", "4", "--epochs", "4", "--log", name, "--out", folder / "run",
        env={"WANDB_MODE": "offline", "WANDB_SILENT": "true", **env}, cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    return folder / "run"


def aps(folder):
    return [(row["step"], row["ap"]) for row in runs.find(str(folder)).history().evaluations]


def test_tensorboard_gets_steps_and_scores(toys, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = run(toys, tmp_path, "tensorboard")
    code = (
        "import sys, json; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n"
        "e = E(sys.argv[1]); e.Reload(); s = lambda n: [(x.step, x.value) for x in e.Scalars(n)]\n"
        "print(json.dumps({n: s(n) for n in e.Tags()['scalars']}))"
    )
    read = subprocess.run(
        [sys.executable, "-c", code, folder / "tensorboard"], capture_output=True, text=True, check=True
    )
    found = json.loads(read.stdout)
    assert found["val/ap"] == [[step, pytest.approx(ap, abs=1e-6)] for step, ap in aps(folder)]
    losses = runs.find(str(folder)).history().curve("loss")[1]
    sent = dict(found["train/loss"])
    assert sent[3] == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)  # the mean since it was told last
    assert {"train/lr", "train/ce", "time/waited"} <= found.keys()


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("wandb") is None, reason="wandb is not installed (60 MB: not among the test tools)"
)
def test_wandb_is_told_offline(toys, tmp_path):
    folder = run(toys, tmp_path, "wandb")
    (kept,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert b"val/ap" in content
    assert b"recipe.lr" in content
    assert json.loads((folder / "loggers.json").read_text())["wandb"].encode() in kept.name.encode()


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("mlflow") is None,
    reason="mlflow is not installed (mlflow-skinny is enough: not among the test tools)",
)
def test_mlflow_is_told(toys, tmp_path):
    store = tmp_path / "store"
    folder = run(toys, tmp_path, "mlflow", MLFLOW_TRACKING_URI=store.as_uri(), MLFLOW_ALLOW_FILE_STORE="true")
    (told,) = store.glob("*/*/metrics/val/ap")
    assert [
        (int(step), float(value)) for _, value, step in map(str.split, told.read_text().splitlines())
    ] == aps(folder)
    (meta,) = store.glob("*/*/meta.yaml")
    assert json.loads((folder / "loggers.json").read_text())["mlflow"] == meta.parent.name
    assert (meta.parent / "params" / "recipe.lr").read_text() == "0.001"


class Kept:
    def __init__(self):
        self.told = []

    def scalars(self, step, values):
        self.told.append(values)

    def close(self, status): ...


def test_a_mean_leaves_out_what_is_not_finite():
    """A gradient that overflowed in 16 bits has no norm; a run of them tells none."""
    told = Logging("kept", sink=Kept())
    told.waiting = [{"loss": 1.0, "norm": float("nan")}, {"loss": 2.0, "norm": 4.0}]
    told._send(2)
    told.waiting = [{"loss": 1.0, "norm": float("inf")}]
    told._send(3)
    assert told.sink.told == [{"loss": 1.5, "norm": 4.0}, {"loss": 1.0}]


class Failing:
    def __init__(self, folder, settings, step):
        self.told = 0

    def scalars(self, step, values):
        self.told += 1
        if self.told > 1:
            raise builtins.ConnectionError("the server went away")

    def close(self, status): ...


def test_a_logger_that_fails_is_left_out_with_one_note(toys, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loggers, "_SINKS", {"tensorboard": Failing})
    monkeypatch.setattr(loggers, "check", lambda names: None)
    assert train(request(toys, "tensorboard"), out=tmp_path / "run").steps == 12
    assert caplog.text.count("tensorboard failed and is left out from here on: the server went away") == 1
    assert runs.find(str(tmp_path / "run")).status == "finished"


def test_a_missing_package_is_told_before_anything_is_made(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        train(request(toys, "wandb"), out=tmp_path / "run")
    assert "detrcli[wandb]" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_logger_that_cannot_start_is_an_error_before_the_first_step(toys, tmp_path, monkeypatch):
    def refuse(folder, settings, step):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(loggers, "_SINKS", {"wandb": refuse})
    monkeypatch.setattr(loggers, "check", lambda names: None)
    with pytest.raises(loggers.DetrError, match="wandb cannot start: not logged in"):
        train(request(toys, "wandb"), out=tmp_path / "run")
    run = runs.find(str(tmp_path / "run"))
    assert run.status == "failed"
    assert run.history().steps == []


def test_unknown_loggers_have_their_names_told():
    assert "tensorboard" in (done := detr("train", "shapes", "-m", "detr/tiny", "--log", "tensorbord")).err
    assert done.error(2)
    assert os.environ.get("WANDB_MODE") is None
