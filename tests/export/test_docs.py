"""The example of docs/export.md runs without torch, and finds what `detr predict` finds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detrcli

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow
PAGE = Path(__file__).parent.parent.parent / "docs" / "export.md"
NO_TORCH = "import sys\nfor name in ('torch', 'torchvision', 'detrcli'): sys.modules[name] = None\n"


@pytest.mark.parametrize("family", ["detr", pytest.param("deformable_detr", marks=pytest.mark.long)])
def test_the_example_needs_no_torch_and_finds_the_same(family, make, tmp_path):
    [code] = re.findall(r"^```python no-run:[^\n]*\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "detr.onnx").symlink_to(make(family).file)
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize((160, 120)).save(tmp_path / "img.jpg")
    code = code.replace("score < 0.05", "score < 0.002")  # nothing was trained
    run = subprocess.run(
        [sys.executable, "-c", NO_TORCH + code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = [re.fullmatch(r"(.+) (\S+) at (\S+) (\S+) (\S+) (\S+)", line) for line in run.stdout.splitlines()]
    assert found
    [result] = detrcli.load(str(tmp_path / "detr.onnx")).predict(tmp_path / "img.jpg", conf=0.002)
    best = {}  # of each query, as the example; deformable models answer with several classes
    for d in result.detections:
        best.setdefault(d.box, d)
    assert len(found) == len(best)
    for line, ours in zip(found, best.values(), strict=True):
        assert line is not None
        assert float(line[2]) == pytest.approx(ours.score, abs=0.02)
    corners = np.array([[float(v) for v in line.groups()[2:]] for line in found if line])
    for d in best.values():
        assert np.abs(corners - d.box).max(1).min() < 3, "a box that the example did not find"
