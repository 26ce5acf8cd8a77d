"""D²ETR learns shapes from nothing, its token labels made of the generator's own masks."""

from __future__ import annotations

import json

import pytest

from detrcli.train.plan import Request
from detrcli.train.run import train


@pytest.mark.slow
def test_tiny_learns_shapes(tmp_path):
    request = Request(data="shapes", model="d2etr/tiny", device="cpu", eval_every=4)
    result = train(request, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = ([line["token_focal"] for line in lines if "token_focal" in line][i] for i in (0, -1))
    assert last < 0.5 * first
    assert result.metrics["ap50"] >= 0.70
