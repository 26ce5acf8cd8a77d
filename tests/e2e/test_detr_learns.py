"""Plain DETR is slow to generalise; what can be asked of it in half a minute is to learn eight pictures by heart."""

from __future__ import annotations

import json
import shutil

import pytest

from detrcli.data.shapes import write_shapes
from detrcli.train.plan import Request
from detrcli.train.run import train


@pytest.mark.slow
def test_tiny_learns_eight_pictures_by_heart(tmp_path):
    data = tmp_path / "eight"
    write_shapes(data, "easy", train=8, val=8)
    shutil.rmtree(data / "val")
    shutil.copytree(data / "train", data / "val")
    shutil.copy(data / "annotations" / "instances_train.json", data / "annotations" / "instances_val.json")
    changes = {"recipe.augment": "none", "recipe.epochs": 600, "recipe.batch_size": 8}
    result = train(
        Request(data=str(data), model="detr/tiny", device="cpu", eval_every=300, changes=changes),
        out=tmp_path / "run",
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = ([line["loss"] for line in lines if "loss" in line][i] for i in (0, -1))
    assert last < 0.2 * first
    assert result.metrics["ap50"] >= 0.80
