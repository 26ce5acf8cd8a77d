"""The deformable kind learns to find shapes it has not seen, in half of its declared training."""

from __future__ import annotations

import pytest

from detrcli.train.plan import Request
from detrcli.train.run import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ap50"),
    [
        ("deformable_detr", 0.45),
        ("lite_deformable", 0.45),
        ("lite_dino", 0.55),
        ("dino", 0.55),
    ],
)
def test_tiny_learns_shapes(tmp_path, model, ap50):
    request = Request(data="shapes", model=f"{model}/tiny", device="cpu", epochs=2, eval_every=2)
    assert train(request, out=tmp_path / "run").metrics["ap50"] >= ap50
