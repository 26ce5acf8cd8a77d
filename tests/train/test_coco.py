"""`detr train coco`: by its name, in its own layout, with everything that its annotations hold; and memory that stays where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detrcli.plugins import models
from tests.cli.run import detr
from tests.data.miniature import CATEGORIES, write_coco


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("sets")
    write_coco(place / "coco")
    return place


def test_coco_by_its_name_from_training_to_prediction(root, tmp_path):
    """Ids with gaps, a crowd, an empty picture, grey and turned ones; classes keep their ids and names to the end."""
    env = {"DETR_DATA": str(root), "DETR_RUNS": str(tmp_path)}
    done = detr(
        "train", "coco", "-m", "deformable_detr/tiny", "--epochs", "2", "--batch-size", "2", "--json", env=env
    )
    assert done.code == 0, done.err
    assert done.json["steps"] == 4
    assert done.json["metrics"].keys() >= {"ap", "ap50", "ar100"}
    scored = detr("eval", "coco", "-m", "deformable_detr/tiny", "--json", env=env)
    assert scored.code == 0, scored.err
    assert scored.json["metrics"]["ap"] == pytest.approx(done.json["metrics"]["ap"], abs=1e-6)
    found = detr(
        "predict",
        root / "coco" / "val2017" / "a.jpg",
        "-m",
        "deformable_detr",
        "--conf",
        "0",
        "--json",
        env=env,
    )
    assert found.code == 0, found.err
    classes = {(d["category_id"], d["name"]) for d in found.json["images"][0]["detections"]}
    assert classes <= {(c["id"], c["name"]) for c in CATEGORIES}


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(root, tmp_path):
    env = {"DETR_DATA": str(root), "DETR_RUNS": str(tmp_path)}
    done = detr(
        "train", "coco", "-m", "detr/tiny", "--batch-size", "4", "--device-batch", "2", "--dry-run", env=env
    )
    assert done.code == 0, done.err
    assert "4 with 5 objects of 3 classes; 4 to validate on" in done.out
    assert "4 = 1 devices x 2 at once x 2 accumulated" in done.out
    assert "recipe.lr" in done.out
    assert "GiB" in done.out
    assert not list(tmp_path.iterdir())


def test_coco_that_is_not_there_says_what_it_would_be(tmp_path):
    done = detr("train", "coco", "-m", "detr/tiny", "--data-root", tmp_path, env={"DETR_DATA": ""})
    assert f"coco is not on this machine (looked in {tmp_path}" in done.error(3)
    assert "instances_{train,val}2017.json" in done.err
    assert "http://images.cocodataset.org" in done.err


# the papers' tiny variants train here; what they learn is asked of them in tests/e2e
TINY = """
import sys
from pathlib import Path
from detrcli.train.plan import Request
from detrcli.train.run import train
for name in sys.argv[3:]:
    done = train(Request(data=sys.argv[1], model=name, batch_size=4, steps=3, device="cpu"),
                 out=Path(sys.argv[2]) / name.replace("/", "-"))
    print(name, done.steps, done.folder)
"""


def test_every_family_trains_by_the_same_engine(root, tmp_path):
    names = sorted(model.name for model in models() if model.variant.name == "tiny")
    assert len(names) >= 7
    command = [sys.executable, "-c", TINY, str(root / "coco"), str(tmp_path), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    assert [(name, steps) for name, steps, _ in told] == [(name, "3") for name in names]
    for _, _, folder in told:
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        assert len([line for line in lines if "loss" in line]) == 3


MEMORY = """
import json, os, sys
from pathlib import Path
from detrcli.data.shapes import write_shapes
from detrcli.train.plan import Request
from detrcli.train.run import train

def resident(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))

def family():
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(resident(pid) for pid in ["self", *children]) / 1024

class Watch:
    held = []
    def begins(self, job): self.job = job
    def step(self, step):
        if (step.number + 1) % self.job.steps_per_epoch == 0:
            self.held.append(family())
    def evaluated(self, *told): ...
    def ended(self): ...

folder = Path(sys.argv[1])
write_shapes(folder / "data", "easy", train=240, val=8)
request = Request(data=str(folder / "data"), model="detr/tiny", batch_size=4, epochs=7, workers=2, device="cpu",
                  eval_every=7, ema=0.9)
train(request, out=folder / "run", watch=Watch())
print(json.dumps(Watch.held))
"""


@pytest.mark.long
def test_memory_is_flat_over_epochs_with_two_workers(tmp_path):
    """Of this process and its workers: five epochs, after two to warm up, may not add more than a few pictures."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])
    assert len(held) == 7
    assert held[-1] - held[1] < 0.02 * held[1], held
