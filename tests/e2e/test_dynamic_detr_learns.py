"""Dynamic DETR's tiny variant learns the drawn shapes in three quarters of the training that it declares."""

from __future__ import annotations

import pytest

from detrcli.train.plan import Request
from detrcli.train.run import train


@pytest.mark.slow
def test_tiny_learns_shapes(tmp_path):
    request = Request(data="shapes", model="dynamic_detr/tiny", device="cpu", epochs=3, eval_every=3)
    result = train(request, out=tmp_path / "run")
    assert result.metrics["ap50"] >= 0.65
