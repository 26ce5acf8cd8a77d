"""The other formats and options, each in its own runtime. Every file here was verified when it was made."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import detrcli
from detrcli import ops
from detrcli.errors import ModelError
from detrcli.export.run import shake
from detrcli.nn.inference import infer
from tests.export.conftest import weights_of

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow


def batch(size=(90, 120)):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, *size, generator=generator)
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[1, size[0] * 2 // 3 :] = True
    return images.masked_fill(mask[:, None], 0), mask


def batch_of(count):
    images, mask = batch((64, 96))
    return images[-count:], mask[-count:]


def agree(exported, images, mask):
    ours = infer(detrcli.load(weights=weights_of(exported), device="cpu").model, images, mask)
    theirs = infer(detrcli.load(str(exported.file)).model, images, mask)
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=0, atol=2e-4)
    torch.testing.assert_close(theirs.boxes, ours.boxes, rtol=0, atol=2e-5)


def test_a_program_of_torch_runs_on_its_own(make):
    exported = make("detr", ".pt2")
    agree(exported, *batch())
    program = torch.export.load(exported.file).module()
    assert list(program(*batch())) == ["logits", "boxes"]


def test_openvino_agrees(make):
    pytest.importorskip("openvino")
    exported = make("detr", ".xml")
    assert sorted(p.name for p in exported.file.parent.glob("model*")) == [
        "model.bin",
        "model.xml",
        "model.xml.json",
    ]
    both = [exported.file.with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin")]
    assert exported.size == sum(map(len, both))
    assert list(exported.sha256.values()) == [hashlib.sha256(one).hexdigest() for one in reversed(both)]
    agree(exported, *batch())


def test_indexing_takes_the_place_of_grid_sample(make):
    onnx = pytest.importorskip("onnx")
    exported = make("deformable_detr", msda="gather", dynamic=(), size=(64, 96))
    assert "GridSample" not in {node.op_type for node in onnx.load(exported.file).graph.node}


def test_a_setting_of_the_model_changes_what_is_written(make):
    """OpenVINO has no DeformConv, and runs the other form."""
    pytest.importorskip("openvino")
    settings = {"operators": "grid_sample"}
    exported = make("dynamic_detr", ".xml", settings=settings)
    assert exported.report.passed
    assert 'type="GridSample"' in exported.file.read_text()


@pytest.mark.parametrize("family", ["lite_dino", "dino"])
def test_every_number_agrees_at_one_size(family, make):
    assert {case.agreement for case in make(family, dynamic=(), size=(96, 128)).report.cases} == {1}


def test_pictures_of_one_size_are_padded_and_shrunk_to_it(make):
    exported = make("detr", dynamic=(), size=(64, 96))
    [images, *_] = onnxruntime.InferenceSession(
        exported.file, providers=["CPUExecutionProvider"]
    ).get_inputs()
    assert images.shape == [1, 3, 64, 96]
    assert exported.description.preprocess.long_side == 96
    predictor = detrcli.load(str(exported.file))
    picture = np.random.default_rng(0).integers(
        0, 255, (120, 50, 3), np.uint8
    )  # upright: does not fit as it is
    [result] = predictor.predict(picture, conf=0.0)
    assert all(0 <= v <= 120 for found in result.detections for v in found.box)
    images, mask = batch((50, 96))
    padded = torch.nn.functional.pad(images, (0, 0, 0, 14))
    padding = torch.nn.functional.pad(mask, (0, 0, 0, 14), value=True)
    model = detrcli.load(weights=weights_of(exported), device="cpu").model
    torch.testing.assert_close(
        infer(predictor.model, images, mask).boxes, infer(model, padded, padding).boxes, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("dynamic", [(), ("batch",), ("size",)])
def test_the_mask_is_as_fixed_as_the_pictures(dynamic, make):
    size = None if "size" in dynamic else (64, 96)
    exported = make("detr", dynamic=dynamic, **({"size": size} if size else {}))
    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    batch = "batch" if "batch" in dynamic else 1
    sides = [*size] if size else ["height", "width"]
    assert {v.name: v.shape for v in session.get_inputs()} == {"images": [batch, 3, *sides]}
    optional = {v.name: v.shape for v in session.get_overridable_initializers()}
    as_mask = [f"mask_{side}" if isinstance(side, str) else side for side in (batch, *sides)]
    assert optional == {"mask": as_mask}
    images, mask = batch_of(2 if "batch" in dynamic else 1)
    without = session.run(None, {"images": images.numpy()})
    none = session.run(None, {"images": images.numpy(), "mask": np.zeros(mask.shape, np.bool_)})
    padded = session.run(None, {"images": images.numpy(), "mask": mask.numpy()})
    np.testing.assert_array_equal(without[1], none[1])
    assert np.abs(padded[1] - without[1]).max() > 1e-6, "padding is not seen"
    agree(exported, images, mask)
    if find_spec("openvino"):
        import openvino

        compiled = openvino.compile_model(exported.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        [boxes] = [v for k, v in compiled({"images": images.numpy()}).items() if k.get_any_name() == "boxes"]
        np.testing.assert_allclose(boxes, without[1], rtol=0, atol=2e-5)


def test_openvino_of_one_size_has_a_mask_of_that_size(make):
    openvino = pytest.importorskip("openvino")
    exported = make("detr", ".xml", dynamic=(), size=(64, 96))
    model = openvino.Core().read_model(exported.file)
    shapes = {value.get_any_name(): list(value.get_partial_shape().to_shape()) for value in model.inputs}
    assert shapes == {"images": [1, 3, 64, 96], "mask": [1, 64, 96]}
    agree(exported, *batch_of(1))


@pytest.mark.parametrize("family", ["detr", pytest.param("d2etr", marks=pytest.mark.long)])
def test_processing_inside_the_graph_gives_the_same_detections(family, make):
    exported = make(family, postprocess=True, preprocess=True)
    picture = np.random.default_rng(3).integers(0, 255, (100, 130, 3), np.uint8)
    [ours] = detrcli.load(weights=weights_of(exported), device="cpu").predict(picture, conf=0.0)
    [theirs] = detrcli.load(str(exported.file)).predict(picture, conf=0.0)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours.detections, theirs.detections, strict=True):
        assert (a.name, a.score) == (b.name, pytest.approx(b.score, abs=1e-5))
        assert a.box == pytest.approx(b.box, abs=1e-2)


@pytest.mark.parametrize("family", ["detr", pytest.param("dynamic_detr", marks=pytest.mark.long)])
def test_half_precision_halves_the_file_and_keeps_the_detections(make, family):
    """Of these two ONNX Runtime crashed when the exporter got operators whole."""
    whole, half = make(family), make(family, half=True)
    assert half.file.stat().st_size < 0.6 * whole.file.stat().st_size
    assert half.description.precision == "float16"
    assert half.report is not None
    assert half.report.judged("median")["boxes"] <= 0.005


def test_openvino_in_16_bits_has_the_names_that_compiling_loses(make):
    pytest.importorskip("openvino")
    assert make("detr", ".xml", half=True).report.passed


@torch.no_grad()
@pytest.mark.parametrize("model", detrcli.list_models("*/tiny"))
def test_every_model_computes_in_16_bits(model):
    """What an export with half needs: no operator is given two types, and boxes stay exact."""
    torch.manual_seed(0)
    whole = detrcli.create_model(model).eval()
    shake(whole)
    images, mask = batch()
    with ops.use("reference"):
        expected, found = whole(images, mask), whole.half()(images.half(), mask)
    assert found.logits.dtype == torch.float16
    assert (found.logits.sigmoid() - expected.logits.sigmoid()).abs().median() < 0.01
    assert (found.boxes.float() - expected.boxes).abs().median() < 0.01


@pytest.mark.long
def test_two_exports_take_turns_while_a_third_thread_trains(tmp_path):
    def export(name):
        return detrcli.export("deformable_detr/tiny", tmp_path / name, weights="random", verify=False)

    before, net = ops.backend("cpu").name, detrcli.create_model("deformable_detr/tiny").train()
    with ThreadPoolExecutor(2) as pool:
        exports = [pool.submit(export, name) for name in ("a.onnx", "b.onnx")]
        while not all(one.done() for one in exports):
            net(*batch((64, 96))).logits.sum().backward()
    assert all(one.result().file.exists() for one in exports)
    assert ops.backend("cpu").name == before


def test_what_openvino_does_not_read_is_said(tmp_path):
    pytest.importorskip("openvino")
    fixed = {"dynamic": (), "size": (64, 96)}
    with pytest.raises(ModelError, match="OpenVINO does not understand the model's graph at") as caught:
        detrcli.export("dynamic_detr/tiny", tmp_path / "model.xml", weights="random", **fixed)
    assert "operators=grid_sample" in caught.value.hint
    assert not list(tmp_path.iterdir())
