"""Full-size models of every family and variant, random weights: `make export-full`, one to four minutes and 3 GB a model."""

from __future__ import annotations

import pytest

import detrcli
from detrcli.export.verify import TOLERANCES

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.full_size

MODELS = [m for m in detrcli.list_models() if not m.endswith("/tiny")]


@pytest.mark.parametrize("model", MODELS)
def test_a_full_size_model_is_exported_and_verified(model, tmp_path):
    report = detrcli.export(model, tmp_path / "model.onnx", weights="random").report
    assert report is not None
    assert report.passed
    for rule in ("largest", "median"):
        assert report.judged(rule).get("boxes", 0) <= TOLERANCES["boxes"]
