"""ONNX files of all families, in ONNX Runtime: valid, standard, of any batch and size, and with the model's answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import detrcli
from detrcli.export.description import KEY
from detrcli.export.verify import TOLERANCES
from detrcli.nn.inference import infer
from tests.export.conftest import FAMILIES, weights_of
from tests.tiny import CATEGORIES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
SPECIAL = {
    "deformable_detr": {"GridSample"},
    "lite_deformable": {"GridSample"},
    "lite_dino": {"GridSample"},
    "dino": {"GridSample"},
    "dynamic_detr": {"DeformConv", "RoiAlign"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, make):
    return make(request.param)


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_the_file_is_standard_and_says_what_it_is(exported):
    model = onnx.load(exported.file)
    onnx.checker.check_model(model, full_check=True)
    assert {(o.domain, o.version) for o in model.opset_import if o.domain == ""} == {("", 20)}
    assert {node.domain for node in model.graph.node} == {""}
    family = exported.description.model.partition("/")[0]
    assert SPECIAL.get(family, set()) <= {node.op_type for node in model.graph.node}
    said = json.loads({prop.key: prop.value for prop in model.metadata_props}[KEY])
    assert said["model"] == f"{family}/tiny"
    assert said["categories"]["names"] == list(CATEGORIES.names)
    assert len(said["weights_sha256"]) == 64
    for place in (ROOT, Path(sys.prefix), Path(torch.__file__).parent, exported.file.parent):
        assert str(place).encode() not in exported.file.read_bytes(), "the file tells about this machine"


def test_every_axis_that_varies_has_a_name(exported):
    inputs = {value.name: value.shape for value in session_of(exported.file).get_inputs()}
    assert inputs == {"images": ["batch", 3, "height", "width"]}  # the mask has a value in the file
    mask = {value.name: value.shape for value in session_of(exported.file).get_overridable_initializers()}
    assert mask == {"mask": ["mask_batch", "mask_height", "mask_width"]}


def test_it_was_verified_with_room_to_spare(exported):
    report = exported.report
    assert report is not None
    assert report.passed
    assert len(report.cases) == 3
    assert all(case.agreement == 1 for case in report.cases)
    assert report.largest["logits"] < TOLERANCES["logits"] / 5
    assert report.largest["boxes"] < TOLERANCES["boxes"] / 5
    written = json.loads(exported.report_file.read_text())
    assert written["verification"]["largest"] == report.largest
    pictures = [case["pictures"] for case in written["verification"]["cases"]]
    assert [text[0] for text in pictures] == ["1", "2", "5"]
    assert len({text[1:] for text in pictures}) == 3, "sizes vary"


def test_the_mask_may_be_left_out_or_be_one_for_all(exported):
    session, generator = session_of(exported.file), np.random.default_rng(0)
    images = generator.standard_normal((2, 3, 72, 91), np.float32)
    without = session.run(None, {"images": images})
    for mask in (np.zeros((1, 1, 1), np.bool_), np.zeros((2, 72, 91), np.bool_)):
        for a, b in zip(without, session.run(None, {"images": images, "mask": mask}), strict=True):
            np.testing.assert_array_equal(a, b)
    mask = np.zeros((1, 72, 91), np.bool_)
    mask[:, 50:] = True
    padded = session.run(None, {"images": images, "mask": mask})[1]
    np.testing.assert_array_equal(
        padded, session.run(None, {"images": images, "mask": mask.repeat(2, axis=0)})[1]
    )
    assert np.abs(padded - without[1]).max() > 1e-6, "padding is not seen"


def test_openvino_runs_it_too(exported):
    openvino = pytest.importorskip("openvino")
    if "DeformConv" in {node.op_type for node in onnx.load(exported.file).graph.node}:
        pytest.skip("OpenVINO has no DeformConv: test_formats.py runs the other form")
    images = np.random.default_rng(1).standard_normal((2, 3, 72, 91), np.float32)
    ours = session_of(exported.file).run(["logits", "boxes"], {"images": images})
    compiled = openvino.compile_model(exported.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = {value.get_any_name(): array for value, array in compiled({"images": images}).items()}
    np.testing.assert_allclose(answers["logits"], ours[0], rtol=0, atol=2e-4)
    np.testing.assert_allclose(answers["boxes"], ours[1], rtol=0, atol=2e-5)


def test_its_answers_are_the_models_at_sizes_that_were_not_verified(exported):
    model = detrcli.load(weights=weights_of(exported), device="cpu").model
    file = detrcli.load(str(exported.file)).model
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in ((1, 64, 128), (3, 101, 67)):
        images = torch.randn(batch, 3, height, width, generator=generator)
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        mask[-1, :, width - 20 :] = True
        ours, theirs = infer(model, images, mask), infer(file, images, mask)
        torch.testing.assert_close(theirs.logits, ours.logits, rtol=0, atol=2e-4)
        torch.testing.assert_close(theirs.boxes, ours.boxes, rtol=0, atol=2e-5)
        for name in theirs.extras:
            torch.testing.assert_close(theirs.extras[name], ours.extras[name], rtol=0, atol=2e-4)
