"""What a training leaves behind, and that it can be used again."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from detrcli import runs
from detrcli.data.shapes import CATEGORIES
from detrcli.environment import command, git_state, of_a_run
from detrcli.errors import DetrError
from detrcli.runs import lock
from detrcli.train import record, resuming
from detrcli.train.plan import Request, make_plan
from detrcli.train.run import train
from tests.cli.run import detr


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_record_of_a_run_is_whole(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = rows(trained / "steps.csv"), rows(trained / "evaluations.csv")
    assert [float(row["loss"]) for row in steps] == [line["loss"] for line in lines if "loss" in line]
    assert [float(row["ap50"]) for row in evaluations] == [line["ap50"] for line in lines if "ap50" in line]
    assert [int(row["step"]) for row in steps] == list(range(10))
    assert all(0 <= float(row["waited"]) <= float(row["seconds"]) for row in steps)
    with Image.open(trained / "curves.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.getcolors(10_000_000)) > 20
    pictures = json.loads((trained / "samples" / "samples.json").read_text())["pictures"]
    assert [entry["file"] for entry in pictures] == [f"{i}.jpg" for i in range(1, 7)]
    page = (trained / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert ">finished<" in page


def test_the_environment_tells_versions_and_no_secrets(trained, monkeypatch):
    text = (trained / "environment.json").read_text()
    facts = json.loads(text)
    assert facts["packages"]["torch"] != "not installed"
    assert facts["system"]["torch threads"] == 1
    assert facts["kernels"]["cpu"]
    monkeypatch.setenv("MY_SECRET", "canary-in-the-environment")
    assert "canary" not in json.dumps(of_a_run())
    assert os.environ["PATH"] not in text
    typed = ["/bin/detr", "train", "--weights", "https://me:secret@host/x?token=abc", "hf_abcdefghijk"]
    assert command(typed) == "detr train --weights 'https://***@host/x?token=***' '***'"


def test_the_projects_commit_is_read_and_its_repository_left_alone(tmp_path):
    def git(*words):
        calm = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *calm, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").touch()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / ".git").rglob("*") if p.is_file()
    }
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / ".git").rglob("*") if p.is_file()}
    assert before == after


def test_without_git_the_state_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_a_runs_settings_run_again_to_the_same_numbers(trained, tmp_path):
    done = detr(
        "train", "--config", trained / "config.toml", "--out", tmp_path / "again", "--steps", "3", "--json"
    )
    assert done.code == 0, done.err
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (trained, tmp_path / "again")
    )
    assert [line["loss"] for line in theirs if "loss" in line] == [line["loss"] for line in ours[:3]]
    assert runs.find(str(tmp_path / "again")).settings() == runs.find(str(trained)).settings() | {"steps": 3}


def test_what_a_killed_process_logged_beyond_its_last_state_is_forgotten(toys, tmp_path):
    class Stop:
        def begins(self, job): ...
        def evaluated(self, step, result, best): ...
        def ended(self): ...
        def step(self, step):
            if step.number == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    request = Request(data=str(toys), model="detr/tiny", batch_size=4, epochs=2, device="cpu")
    folder = train(request, out=tmp_path / "run", watch=Stop()).folder
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "epoch": 1, "loss": 1e9}\n{"step": 8, "epoch": 1, "lo')
    train(Request(), resume=folder)
    history = runs.find(str(folder)).history()
    assert [row["step"] for row in history.steps] == list(range(10))
    assert history.damaged == 0
    assert max(row["loss"] for row in history.steps) < 1e6
    assert [row["step"] for row in history.evaluations] == [5, 10]
    assert len(rows(folder / "steps.csv")) == 10
    assert json.loads((folder / "environment.json").read_text())["resumed"][0]["step"] == 7


def test_two_processes_do_not_train_in_one_folder(toys, tmp_path):
    request = Request(data=str(toys), model="detr/tiny", batch_size=4, epochs=2, steps=1, device="cpu")
    folder = train(request, out=tmp_path / "shared").folder
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"status": "running", "error": "it broke"}))
    assert runs.find(folder).status == "died"
    with (folder / "metrics.jsonl").open("ab") as held:
        lock.take(held, folder)
        assert runs.find(folder).status == "running"
        with pytest.raises(DetrError, match="another process"):
            train(Request(steps=2), resume=folder)
    assert runs.find(folder).status == "died"
    assert train(Request(steps=2), resume=folder).steps == 2
    assert (runs.find(folder).status, runs.find(folder).error) == ("finished", "")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def begun(folder):
    """The record of a new run that has begun there."""
    plan = make_plan(Request(data="shapes", model="detr/tiny", device="cpu"))
    files = record.Record(folder, plan, CATEGORIES)
    files.start()
    return files


def test_who_comes_second_into_a_new_folder_leaves_the_first_one_its_files(tmp_path):
    """Both found it empty."""
    first = begun(tmp_path)
    there = contents(tmp_path)
    assert set(there) == {"metrics.jsonl", "config.toml", "environment.json", "run.json"}
    with pytest.raises(DetrError, match="another process is training in"):
        begun(tmp_path)
    assert contents(tmp_path) == there
    first.close()  # so that the folder is free, but not empty any more
    with pytest.raises(DetrError, match="never overwritten"):
        begun(tmp_path)
    assert contents(tmp_path) == there


def test_a_folder_is_not_cleared_under_who_has_begun_there(tmp_path):
    files = begun(tmp_path)
    there = contents(tmp_path)
    resuming.clear(tmp_path)
    assert contents(tmp_path) == there
    files.close()
    with (tmp_path / "metrics.jsonl").open(
        "ab"
    ) as late:  # opened before the folder was cleared, locked after
        resuming.clear(tmp_path)
        assert contents(tmp_path) == {}
        with pytest.raises(DetrError, match="another process is training in"):
            lock.take(late, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_the_lock_ends_with_its_process_and_not_with_those_that_it_forked(tmp_path):
    """As processes that read pictures, which notice seconds later that nobody waits for them any more."""
    code = (
        "import os, sys, time; from pathlib import Path; from detrcli.runs import lock\n"
        "file = open(sys.argv[1], 'ab', buffering=0); lock.take(file, Path(sys.argv[1]).parent)\n"
        "if not os.fork(): print('forked', flush=True)\n"
        "time.sleep(60)"
    )
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert lock.held(path)
        process.kill()
        process.wait()
        assert not lock.held(path)
        os.killpg(process.pid, 0)  # the forked one still lives
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_a_report_that_cannot_be_written_ends_no_training(toys, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(record, "refresh", _refuse)
    request = Request(data=str(toys), model="detr/tiny", batch_size=4, epochs=1, steps=2, device="cpu")
    assert train(request, out=folder).steps == 2
    assert "the report of the run was not written: no room" in caplog.text
    assert runs.find(str(folder)).status == "finished"


def _refuse(folder):
    raise OSError("no room")


def test_samples_that_cannot_be_written_are_one_note(toys, tmp_path, caplog, monkeypatch):
    from detrcli.train import samples

    calls = []
    monkeypatch.setattr(samples, "write", lambda *a: calls.append(a) or _refuse(a))
    request = Request(data=str(toys), model="detr/tiny", batch_size=4, epochs=2, device="cpu")
    assert train(request, out=tmp_path / "run").steps == 10
    assert len(calls) == 1  # left out after the first failure
    assert len(re.findall("report failed and is left out", caplog.text)) == 1
