"""What a run survives, with real processes, real signals and disks that fail: nothing is ever half written or silently lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from detrcli import files, runs
from detrcli.data.catalog import resolve
from detrcli.errors import CheckpointError, DataError, DetrError
from detrcli.train import state
from detrcli.train.plan import Request, make_plan
from detrcli.train.resuming import planned
from detrcli.train.run import train
from tests.train.conftest import Watch, losses

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def forked(how, shapes, folder, seed, times, limit):
    words = [sys.executable, "-m", "tests.train.forked", how, str(shapes), str(folder), str(seed), str(times)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def hexes(run):
    return {step: loss.hex() for step, loss in losses(run).items()}


def assert_same_run(straight, other):
    assert hexes(straight) == hexes(other)
    for name in ("best.safetensors", "last.safetensors"):
        assert (straight / name).read_bytes() == (other / name).read_bytes()


def assert_all_same(folder):
    runs = list(folder.glob("hit-*"))
    assert runs
    for run in runs:
        assert_same_run(folder / "straight", run)


def test_killed_or_stopped_anywhere_it_goes_on_as_if_nothing_had_happened(shapes, tmp_path):
    """SIGKILL and SIGTERM at random moments of thirty steps with a state after each: while computing, saving, scoring, starting.

    HITS=400 looks closer.
    """
    times = int(os.environ.get("HITS", "20"))
    codes = forked("both", shapes, tmp_path, 2, times, 120 + 4 * times)["codes"]
    assert codes.count(-signal.SIGKILL) == times // 2
    # before handlers stand, a signal ends it as any process
    assert codes.count(143) + codes.count(-signal.SIGTERM) == times - times // 2
    assert codes.count(143) >= times // 4
    assert_all_same(tmp_path)


@pytest.mark.long
def test_asked_to_stop_it_ends_within_seconds(shapes, tmp_path):
    told = forked("stop", shapes, tmp_path, 1, 30, 240)
    assert set(told["codes"]) <= {143, -signal.SIGTERM, 0}
    assert told["codes"].count(143) >= 10
    assert told["longest"] < 5
    assert_all_same(tmp_path)


def test_a_second_signal_ends_it_at_once(shapes, tmp_path):
    """The step at hand takes for ever here; the first signal waits for it, the second does not."""
    code = (
        "import sys, time; from detrcli.train import loop, run; from detrcli.train.plan import Request;"
        "slow = lambda *a, **k: (print('in', flush=True), time.sleep(600));"
        "loop.Trainer.step = slow;"
        f"run.train(Request(data={str(shapes)!r}, model='detr/tiny', device='cpu'), out=sys.argv[1])"
    )
    words = [
        sys.executable,
        "-c",
        code.replace("sys.argv[1]", f"__import__('pathlib').Path({str(tmp_path / 'run')!r})"),
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode != 0


def content(step):
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


@pytest.mark.parametrize("ending", ["dies", "fails"])
def test_a_state_is_old_or_new_wherever_the_writing_breaks_off(tmp_path, ending, monkeypatch):
    """Every call to the system on the way: the process ends there, or the disk says no."""
    broken = 0
    for at in range(1, 40):
        folder = tmp_path / str(at)
        folder.mkdir()
        state.save(folder, content(1))
        state.save(folder, content(2))
        if not (_dies(folder, at) if ending == "dies" else _fails(folder, at, monkeypatch)):
            break
        broken += 1
        kept = state.read(folder)
        assert kept["step"] in (1, 2, 3)
        assert torch.equal(kept["model"]["w"], content(kept["step"])["model"]["w"])
    assert broken >= 5


CALLS = [
    (os, "fsync"),
    (os, "replace"),
    (files.tempfile, "mkstemp"),
    (Path, "replace"),
    (Path, "chmod"),
    (os, "close"),
]


def _counting(at, act):
    """Versions of the calls of which the `at`-th, all together, acts instead."""
    count = 0

    def wrap(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                act()
            return real(*args, **kwargs)

        return call

    return {(owner, name): wrap(getattr(owner, name)) for owner, name in CALLS}


def _dies(folder, at):
    pid = os.fork()
    if pid == 0:
        for (owner, name), call in _counting(at, lambda: os._exit(9)).items():
            setattr(owner, name, call)
        state.save(folder, content(3))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def _fails(folder, at, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        for (owner, name), call in _counting(at, full).items():
            patched.setattr(owner, name, call)
        try:
            state.save(folder, content(3))
        except (DetrError, OSError):
            return True
    return False


def limited(size):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_disk_that_stays_full_ends_in_an_error_that_says_so(shapes, tmp_path):
    """No file may grow beyond 400 kB: metrics fit, weights do not. The training is done, the exit code is not 0."""
    words = [
        "train",
        str(shapes),
        "-m",
        "detr/tiny",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "detrcli", *words],
        capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limited(400_000), timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "training goes on, and tries again" in done.stderr
    assert "not all of it could be written" in done.stderr
    assert sorted(losses(tmp_path / "run")) == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "run").glob(".*.tmp"))


class NoRoom:
    """A disk that has none for the best weights, as many times as it is told."""

    def __init__(self, monkeypatch):
        self.times, self.tried, sync = 0, 0, files._sync

        def full(path):
            if path.name.startswith(".best.safetensors"):
                self.tried += 1
                if self.tried <= self.times:
                    raise OSError(errno.ENOSPC, "No space left on device")
            sync(path)

        monkeypatch.setattr(files, "_sync", full)


def step_of(weights):
    with safe_open(weights, "pt") as file:
        return json.loads(file.metadata()["detrcli"])["made"]["step"]


@pytest.mark.parametrize("epochs", [1, 2], ids=["the last score", "a score on the way"])
def test_best_weights_that_could_not_be_written_are_tried_again(shapes, tmp_path, monkeypatch, epochs):
    """The second epoch, with a rate of 0 and so the same score, is no better: it is the first one's weights that are owed."""
    wish = {"lr": 0.0, "epochs": epochs, "device": "cpu", "batch_size": 4}
    request = Request(data=str(shapes), model="deformable_detr/tiny", **wish)
    straight = train(request, out=tmp_path / "straight").folder
    disk = NoRoom(monkeypatch)
    disk.times = 1
    run = train(request, out=tmp_path / "run").folder
    assert disk.tried == 2
    assert step_of(run / "best.safetensors") == 5
    assert_same_run(straight, run)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert state.read(run)["best"] is not None


def test_a_run_without_its_best_weights_is_not_finished_and_scores_them_again(shapes, tmp_path, monkeypatch):
    request = Request(data=str(shapes), model="detr/tiny", batch_size=4, epochs=1, device="cpu")
    straight = train(request, out=tmp_path / "straight")
    disk = NoRoom(monkeypatch)
    disk.times = 99
    with pytest.raises(DetrError, match=r"not all of it could be written: cannot write .*best\.safetensors"):
        train(request, out=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["status"] == "failed"
    assert "best.safetensors" in told["error"]
    assert state.read(tmp_path / "run")["best"] is None
    assert not (tmp_path / "run" / "best.safetensors").exists()
    disk.times = 0
    assert train(Request(), resume=tmp_path / "run").metrics == straight.metrics
    assert_same_run(straight.folder, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_on_a_small_disk_the_run_is_refused_before_it_starts(shapes, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount here, which a small disk of its own needs")
    try:
        with pytest.raises(DetrError, match="GiB free"):
            train(Request(data=str(shapes), model="detr/tiny", device="cpu"), out=place / "run")
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(shapes, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(DetrError, match="cannot make"):
        train(Request(data=str(shapes), model="detr/tiny", device="cpu"), out=tmp_path / "closed" / "run")


def test_a_folder_that_is_a_file_is_told(shapes, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DetrError, match=r"cannot make .*file"):
        train(Request(data=str(shapes), model="detr/tiny", device="cpu"), out=tmp_path / "file" / "run")


class _Fallen(Exception): ...


def test_a_run_that_ended_before_it_had_a_state_begins_anew_there(shapes, tmp_path):
    """What a scheduler does: the same command again. Whatever ended it, the folder is its own; with anything else in it, it is not."""

    def fall():
        raise _Fallen

    request = Request(data=str(shapes), model="detr/tiny", batch_size=4, epochs=1, device="cpu")
    run = tmp_path / "run"
    with pytest.raises(_Fallen):
        train(request, out=run, resume="auto", watch=Watch(1, fall))
    assert sorted(losses(run)) == [0, 1]
    assert not state.exists(run)
    (run / ".run.json.x.tmp").touch()  # as a kill leaves it
    assert planned(request, run, "auto", ()) == (make_plan(request), None)  # as --dry-run asks
    assert sorted(losses(run)) == [0, 1]
    assert train(request, out=run, resume="auto").steps == 5
    assert sorted(losses(run)) == [0, 1, 2, 3, 4]
    for name in (state.STATE, state.BEFORE):
        (run / name).unlink(missing_ok=True)
    with pytest.raises(DetrError, match="never overwritten"):  # its weights are worth keeping
        train(request, out=run, resume="auto")
    assert (run / "best.safetensors").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(shapes, tmp_path, monkeypatch):
    """The disk says no at the first file that must be whole."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(DetrError, match=r"cannot write .*No space left"):
        train(Request(data=str(shapes), model="detr/tiny", device="cpu"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def spoiled(shapes, tmp_path):
    """The little data set with two pictures that cannot be read and a box without area."""
    folder = tmp_path / "spoiled"
    shutil.copytree(shapes, folder)
    pictures = sorted((folder / "train").iterdir())
    pictures[3].write_bytes(pictures[3].read_bytes()[:200])
    pictures[8].write_text("<html>")
    annotations = folder / "annotations" / "instances_train.json"
    document = json.loads(annotations.read_text())
    document["annotations"][0]["bbox"][2] = 0
    annotations.write_text(json.dumps(document))
    return folder, {pictures[3].name, pictures[8].name}


def test_bad_data_stops_the_run_and_is_named(spoiled, tmp_path):
    folder, names = spoiled
    request = Request(data=str(folder), model="detr/tiny", batch_size=4, epochs=1, device="cpu")
    with pytest.raises(DataError, match=r"png: not a picture .* cannot be decoded") as caught:
        train(request, out=tmp_path / "run")
    assert any(name in caught.value.message for name in names)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()  # the header has told, before training begins
    html = next(p for p in (folder / "train").iterdir() if p.read_bytes() == b"<html>")
    html.write_bytes(next(p for p in (folder / "train").iterdir() if p.name not in names).read_bytes())
    with pytest.raises(
        DataError, match="damaged"
    ) as caught:  # what no header tells ends the run where it is met
        train(request, out=tmp_path / "run")
    assert any(name in caught.value.message for name in names)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_data_is_counted_and_named(spoiled, tmp_path, workers):
    folder, names = spoiled
    val = sorted((folder / "val").iterdir())[2]
    val.write_bytes(val.read_bytes()[:200])
    request = Request(data=str(folder), model="detr/tiny", batch_size=4, epochs=1, device="cpu", bad_data="skip",
                      workers=workers)  # fmt: skip
    watch = Watch()
    train(request, out=tmp_path / "run", watch=watch)
    assert (len(watch.job.val), len(watch.scores)) == (6, 1)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(told["skipped"]["train"]) == names
    assert set(told["skipped"]["val"]) == {val.name}
    assert sorted(losses(tmp_path / "run")) == [
        0,
        1,
        2,
        3,
    ]  # the header of one has told: 19 pictures are left


def set_box(*box):
    return lambda row: row.update(bbox=list(box))


OF_OBJECTS = {
    "non-finite-box": set_box(1, 2, float("nan"), 4),
    "bad-box": set_box(1, 2, 3),
    "empty-box": set_box(4, 5, 0, 10),
    "outside-box": set_box(400, 5, 9, 10),
    "box-over-edge": lambda row: row["bbox"].__setitem__(2, 90),
    "unknown-category": lambda row: row.update(category_id=77),
    "unknown-image": lambda row: row.update(image_id=12345),
    "bad-annotation-id": lambda row: row.update(id="7"),
    "zero-annotation-id": lambda row: row.update(id=0),
    "missing-id": lambda row: row.pop("id"),
    "missing-area": lambda row: row.pop("area"),
    "missing-iscrowd": lambda row: row.pop("iscrowd"),
    "bad-iscrowd": lambda row: row.update(iscrowd=3),
    "bad-area": lambda row: row.update(area=-1),
}


def one_of_each(shapes, folder):
    """A data set with one of each kind of fault; the names of the pictures that are bad, by kind."""
    shutil.copytree(shapes, folder)
    path = folder / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    images, rows = document["images"], document["annotations"]
    for row, spoil in zip(rows, OF_OBJECTS.values(), strict=False):
        spoil(row)
    last = len(OF_OBJECTS)
    rows.append({**rows[last], "id": 900})  # duplicate-object
    rows.append(
        {**rows[last + 1], "id": rows[last + 2]["id"]}
    )  # duplicate-annotation-id, and duplicate-object
    rows.append("text")
    images[15]["file_name"] = "../out.png"
    images[16]["id"] = images[17]["id"]
    images.append({"id": 901})
    kinds = ("missing-file", "unreadable-image", "size-differs", "damaged")
    bad = dict(zip(kinds, (image["file_name"] for image in images[10:14]), strict=True))
    place = {kind: folder / "train" / name for kind, name in bad.items()}
    place["missing-file"].unlink()
    place["unreadable-image"].write_text("<html>")
    with Image.open(place["size-differs"]) as picture:
        picture.resize((50, 40)).save(place["size-differs"])
    place["damaged"].write_bytes(place["damaged"].read_bytes()[:300])
    path.write_text(json.dumps(document))
    return document, bad


def test_one_of_each_fault_is_counted_and_nothing_is_lost(shapes, tmp_path):
    document, bad = one_of_each(shapes, tmp_path / "data")
    request = Request(data=str(tmp_path / "data"), model="detr/tiny", batch_size=4, epochs=1, device="cpu")
    with pytest.raises(DataError, match=r"and 1?[0-9] more"):
        train(request, out=tmp_path / "stopped")
    watch = Watch()
    train(replace(request, bad_data="skip"), out=tmp_path / "run", watch=watch)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    found = {row["kind"]: row for row in told["defects"]["train"]}
    once = {*OF_OBJECTS, "duplicate-annotation-id", "bad-annotation", "path-escapes", "duplicate-image-id", "bad-image",
            "missing-file", "unreadable-image", "size-differs"}  # fmt: skip
    assert once <= found.keys()
    for kind in once:
        assert found[kind]["examples"], kind
    assert set(told["skipped"]["train"]) == set(bad.values())
    of_entries = sum(found[kind]["count"] for kind in ("path-escapes", "duplicate-image-id", "bad-image"))
    seen = len(watch.job.dataset) - 1  # the damaged one is skipped when it is read
    assert seen + len(told["skipped"]["train"]) + of_entries == len(document["images"])


def test_names_that_are_not_utf8_are_in_the_record(spoiled, tmp_path):
    """Latin-1, as an old archive unpacks it."""
    folder, _ = spoiled
    file = folder / "annotations" / "instances_train.json"
    for path in (folder / "train").iterdir():
        os.rename(path, os.fsencode(path.with_suffix("")) + b"\xe9.png")
    file.write_text(file.read_text().replace(".png", "\\udce9.png"))
    request = Request(data=str(folder), model="detr/tiny", batch_size=4, epochs=1, steps=1, device="cpu")
    run = train(replace(request, bad_data="skip"), out=tmp_path / "run").folder
    about = runs.read(run)
    assert about["status"] == "finished"
    assert all(name.endswith("?.png") for name in about["skipped"]["train"])
    assert len(about["skipped"]["train"]) == 2


def test_structure_that_is_broken_is_found_before_the_first_step(spoiled, tmp_path):
    folder, _ = spoiled
    annotations = folder / "annotations" / "instances_train.json"
    document = json.loads(annotations.read_text())
    document["annotations"][1]["bbox"] = [1, 2, float("nan"), 4]
    annotations.write_text(json.dumps(document))
    request = Request(data=str(folder), model="detr/tiny", batch_size=4, steps=1, device="cpu")
    with pytest.raises(DataError, match="NaN"):
        train(request, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(Request(**{**{f: getattr(request, f) for f in request.__slots__}, "bad_data": "skip"}),
                 out=tmp_path / "run").steps == 1  # fmt: skip


def test_one_picture_no_validation_and_classes_without_objects(tmp_path, shapes):
    folder = tmp_path / "one"
    shutil.copytree(shapes, folder)
    shutil.rmtree(folder / "val")
    (folder / "annotations" / "instances_val.json").unlink()
    annotations = folder / "annotations" / "instances_train.json"
    document = json.loads(annotations.read_text())
    keep = document["images"][:1]
    document["images"] = keep
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] == keep[0]["id"]]
    document["categories"].append({"id": 99, "name": "unseen"})
    annotations.write_text(json.dumps(document))
    told = []

    class Watch:
        def begins(self, job):
            told.extend(job.notes)

        def step(self, step): ...
        def evaluated(self, step, result, best): ...
        def ended(self): ...

    done = train(Request(data=str(folder), model="detr/tiny", batch_size=4, epochs=2, device="cpu"),
                 out=tmp_path / "run", watch=Watch())  # fmt: skip
    assert done.steps == 2
    assert done.metrics == {}
    said = " ".join(told)
    assert "no validation split" in said
    assert "1 training picture does not fill a batch of 4" in said
    assert "of 4 classes have no training objects" in said
    assert "unseen" in said
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert len(resolve(str(folder), "train").categories) == 4


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="no training run"):
        train(Request(), resume=tmp_path)
