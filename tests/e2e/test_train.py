"""Training end to end with real processes: what a run leaves, and that it goes on exactly where it stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from detrcli.errors import CheckpointError
from detrcli.train import state
from detrcli.train.plan import Request
from detrcli.train.run import train
from tests.cli.run import detr

SMALL = ("--batch-size", "4", "--set", "model.num_queries=6")


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "little"
    assert detr("data", "shapes", folder, "--train", "20", "--val", "6").code == 0
    return folder


def test_train_eval_predict_by_the_models_name(shapes, tmp_path):
    done = detr(
        "train",
        shapes,
        "--model",
        "detr/tiny",
        "--epochs",
        "1",
        *SMALL,
        cwd=tmp_path,
        env={"DETR_RUNS": "runs"},
    )
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "train" / "detr-tiny-little-1"
    about = json.loads((run / "run.json").read_text())
    assert about["status"] == "finished"
    assert about["model"] == "detr/tiny"
    assert len(losses(run)) == 5
    scored = detr("eval", shapes, "--model", "detr/tiny", "--json", cwd=tmp_path, env={"DETR_RUNS": "runs"})
    assert scored.code == 0, scored.err
    assert scored.json["metrics"]["ap"] == pytest.approx(about["best_ap"], abs=1e-6)
    found = detr(
        "predict",
        shapes / "val",
        "--model",
        "detr",
        "--json",
        "--conf",
        "0",
        cwd=tmp_path,
        env={"DETR_RUNS": "runs"},
    )
    assert found.code == 0, found.err
    assert len(found.json["images"]) == 6
    assert str(run.name) in found.json["weights"]


def resume(folder):
    return train(Request(), resume=folder)


def request(data, **changes):
    return Request(data=str(data), model="detr/tiny", batch_size=4, epochs=2, device="cpu", **changes)


def test_a_resumed_run_is_the_run_that_was_never_stopped(shapes, tmp_path):
    straight = train(request(shapes), out=tmp_path / "straight")

    class Stop:
        def begins(self, job): ...
        def evaluated(self, step, result, best): ...
        def ended(self): ...
        def step(self, step):
            if step.number == 6:  # in the middle of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)

    halved = train(request(shapes), out=tmp_path / "halved", watch=Stop())
    assert halved.stopped_by == signal.SIGTERM
    assert halved.steps == 7
    finished = resume(tmp_path / "halved")
    assert finished.steps == straight.steps == 10
    assert losses(straight.folder) == losses(finished.folder)
    ours, theirs = (state.read(r.folder)["model"] for r in (straight, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert straight.metrics == finished.metrics


def test_accumulated_parts_train_as_the_whole_batch(shapes, tmp_path):
    whole = train(request(shapes, steps=2), out=tmp_path / "whole")
    parts = train(request(shapes, steps=2, device_batch=2), out=tmp_path / "parts")
    assert losses(whole.folder)[0] == pytest.approx(losses(parts.folder)[0], rel=1e-4)


def test_seeds_are_runs(shapes, tmp_path):
    first, again, other = (
        losses(train(request(shapes, steps=2, seed=s), out=tmp_path / str(i)).folder)
        for i, s in enumerate((1, 1, 2))
    )
    assert first == again != other


@pytest.mark.long
def test_killed_while_training_the_last_state_stands(shapes, tmp_path):
    """SIGKILL at any moment: what `--resume` needs is whole, and going on at once ends as if nothing had happened; also where
    processes that read pictures have not noticed yet."""
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "detrcli",
        "train",
        str(shapes),
        "-m",
        "detr/tiny",
        "--epochs",
        "10",
        "--workers",
        "2",
        "--out",
        str(run),
        *SMALL,
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (run / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert state.read(run)["step"] >= 5
    assert not [p for p in run.iterdir() if p.suffix == ".safetensors" and p.stat().st_size == 0]
    done = detr("train", "--resume", run, "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 10 * 5
    assert sorted(losses(run)) == list(range(50))


def test_interrupted_says_how_to_go_on(shapes, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "detrcli",
        "train",
        str(shapes),
        "-m",
        "detr/tiny",
        "--epochs",
        "400",
        "--out",
        str(run),
        *SMALL,
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (run / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"--resume {run}" in err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


def test_a_run_is_never_overwritten(shapes, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = detr("train", shapes, "-m", "detr/tiny", "--out", tmp_path / "full")
    assert "never overwritten" in done.error(1)


@pytest.mark.parametrize("damage", ["missing", "truncated", "not a run"])
def test_what_cannot_be_resumed_says_so(shapes, tmp_path, damage):
    run = tmp_path / "run"
    if damage == "not a run":
        run.mkdir()
    else:
        train(request(shapes, steps=1), out=run)
        for state in run.glob("state*.pt"):  # the last one and the one before it
            content = state.read_bytes()
            state.unlink()
            if damage == "truncated":
                state.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        resume(run)


def test_a_loss_that_is_not_finite_stops_before_the_step(shapes, tmp_path):
    done = detr("train", shapes, "-m", "detr/tiny", "--lr", "1e30", "--set", "recipe.clip_norm=1e30", "--set", "recipe.warmup_steps=0",
                "--epochs", "2", "--batch-size", "4", "--out", tmp_path / "run")  # fmt: skip
    assert re.search(r"step 1: .* not finite.* \(pictures: .*\); lr \d.*e\+\d\d;", done.error(1))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
