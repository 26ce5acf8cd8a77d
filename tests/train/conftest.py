from __future__ import annotations

import json

import pytest

from detrcli.data.shapes import write_shapes
from detrcli.train.estimate import worst_batch
from detrcli.train.guard import MemoryShortError
from detrcli.train.plan import Request


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Twenty pictures to train on, seven to score."""
    folder = tmp_path_factory.mktemp("data") / "little"
    write_shapes(folder, "easy", train=20, val=7)
    return folder


@pytest.fixture
def ask(shapes):
    """A request for a small training; five steps an epoch."""

    def request(**changes):
        usual = {"data": str(shapes), "model": "detr/tiny", "batch_size": 4, "epochs": 2, "device": "cpu"}
        return Request(**{**usual, **changes})

    return request


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def only_one_fits(job, size):
    """In place of the worst batch: that of one picture, and too little memory for more."""
    if size > 1:
        raise MemoryShortError("too much")
    return worst_batch(job, size)


class Watch:
    """A watcher that does one thing at one step."""

    def __init__(self, at=-1, do=lambda: None):
        self.at, self.do, self.job, self.scores = at, do, None, []

    def begins(self, job):
        self.job = job

    def step(self, step):
        if step.number == self.at:
            self.do()

    def evaluated(self, step, result, best):
        self.scores.append(result.metrics["ap"])

    def ended(self): ...
