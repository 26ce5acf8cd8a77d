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
    code, _ = examples()
    file = make(family).file
    found = printed(code.replace("score < 0.05", "score < 0.002"), file, tmp_path)  # nothing was trained
    best = {}  # of each query, as the example; deformable models answer with several classes
    for d in detections(file, tmp_path):
        best.setdefault(d.box, d)
    agree(found, list(best.values()))


@pytest.mark.parametrize("size", [(64, 96), (160, 64)])
def test_the_example_pads_for_a_file_of_one_size_that_normalises(size, make, tmp_path):
    code, _ = examples()
    file = make("detr", dynamic=(), size=size, preprocess=True).file
    found = printed(code.replace("score < 0.05", "score < 0.002"), file, tmp_path)
    agree(found, detections(file, tmp_path))


def test_the_example_for_a_file_that_does_the_rest(make, tmp_path):
    code, rest = examples()
    file = make("detr", postprocess=True).file
    found = printed(code[: code.index("logits, boxes =")] + rest.replace("0.05", "0.002"), file, tmp_path)
    agree(found, detections(file, tmp_path))


def examples():
    return re.findall(r"^```python no-run:[^\n]*\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def printed(code, file, folder):
    """Name, score and corners of each line that an example prints about a picture, in a Python without torch."""
    (folder / "detr.onnx").symlink_to(file)
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize((160, 120)).save(folder / "img.jpg")
    run = subprocess.run([sys.executable, "-c", NO_TORCH + code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [re.fullmatch(r"(.+) (\S+) at (\S+) (\S+) (\S+) (\S+)", line) for line in run.stdout.splitlines()]


def detections(file, folder):
    [result] = detrcli.load(str(file)).predict(folder / "img.jpg", conf=0.002)
    return result.detections


def agree(found, expected):
    assert found
    assert len(found) == len(expected)
    for line, ours in zip(found, expected, strict=True):
        assert line is not None
        assert float(line[2]) == pytest.approx(ours.score, abs=0.02)
    corners = np.array([[float(v) for v in line.groups()[2:]] for line in found if line])
    for d in expected:
        assert np.abs(corners - d.box).max(1).min() < 3, "a box that the example did not find"
