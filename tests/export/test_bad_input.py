"""What cannot be exported, or is no export: one line that says so, and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import detrcli
from detrcli import api, distributed
from detrcli.errors import CheckpointError, DetrError, ModelError, UsageError, VerificationError
from detrcli.export import onnx as onnx_file
from detrcli.export import openvino as openvino_file
from detrcli.export import plan
from detrcli.export import program as program_file
from detrcli.export import run as running
from detrcli.export.description import Description
from detrcli.export.graph import Graph, trace
from detrcli.export.plan import Request, dynamic_for, parse_dynamic, parse_size
from detrcli.export.runtime import ExportedModel, providers
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories, Output
from tests.cli.run import detr
from tests.tiny import write_run

PICTURES = Preprocess(short_side=64, long_side=64)
FIXED = {"dynamic": (), "size": (64, 96)}  # the quickest to load


@pytest.fixture
def weights(tmp_path):
    return write_run(tmp_path / "run") / "best.safetensors"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dynamic", "batch,depth"), "unknown dynamic axis 'depth'"),
        (("--dynamic", "batch"), "needs that size"),
        (("--dynamic", "batch,size", "--size", "64x64"), "of one size or of any"),
        (("--size", "8x8"), "too small"),
        (("--size", "big"), "HEIGHTxWIDTH"),
        (("--out", "model.engine"), "what kind of file"),
        (("--out", "model.pt2", "--format", "onnx"), "ends in .onnx"),
        (("--set", "encoder_layer=1"), "encoder_layer"),
        (("--model", "model.onnx"), "is an exported file"),
        (("--no-verify", "--verify-data", "shapes"), "contradict"),
        (("--limit", "5"), "--limit is of the images of --verify-data"),
        (("--dynamic", "none,batch"), "says that something varies and that nothing does"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said, weights, tmp_path):
    done = detr("export", "--weights", weights, *options, cwd=tmp_path)
    assert said in done.error(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_random_weights_are_of_a_model(tmp_path):
    assert "of which model?" in detr("export", "--weights", "random", cwd=tmp_path).error(2)


def test_a_request_is_checked_when_it_is_made():
    with pytest.raises(UsageError, match="unknown form of deformable attention 'foo'"):
        Request(format="onnx", msda="foo")


ORACLE = """
from dataclasses import replace
from detrcli_detr.plugin import plugin as detr
family = replace(detr.families[0], name="oracle", cannot_export="it asks an oracle", key_maps={}, donors={})
plugin = replace(detr, families=(family,))
"""


def test_what_a_plugin_says_cannot_be_exported_is_not_tried(tmp_path):
    (tmp_path / "oracle_plugin.py").write_text(ORACLE)
    about = tmp_path / "oracle-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: oracle\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[detrcli.models]\noracle = oracle_plugin:plugin\n")
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = detr("export", "--model", "oracle/tiny", "--weights", "random", env={"PYTHONPATH": places})
    assert "oracle/tiny cannot be exported: it asks an oracle" in done.error(4)


def test_indexing_is_no_advice_where_it_was_asked_for():
    about = partial(Description, model="a/b", config={}, categories=Categories((), ()), preprocess=PICTURES)
    error = RuntimeError("OpenVINO does not support the following ONNX operations: GridSample")
    hints = [
        openvino_file._cannot_read(error, about(format="openvino", msda=msda)).hint
        for msda in ("gridsample", "gather")
    ]
    assert "--msda gather" in hints[0]
    assert "--msda" not in hints[1]


def test_that_a_form_of_attention_changes_nothing_is_said(weights, tmp_path):
    said = []
    options = {"msda": "gather", "verify": False, **FIXED}
    detrcli.export(None, tmp_path / "a.pt2", weights=weights, tell=said.append, **options)
    assert "--msda gather changes nothing: detr/tiny has no deformable attention" in said
    said.clear()
    model = "deformable_detr/tiny"
    detrcli.export(model, tmp_path / "b.pt2", weights="random", tell=said.append, **options)
    assert not any("changes nothing" in text for text in said)


def test_weights_in_several_files_are_hashed_themselves(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    (tmp_path / "1.safetensors").write_bytes(b"first")
    (tmp_path / "2.safetensors").write_bytes(b"second")
    assert running.sha256_of_weights(index) == hashlib.sha256(b"firstsecond").hexdigest()
    first = tmp_path / "1.safetensors"
    assert running.sha256_of_weights(first) == hashlib.sha256(b"first").hexdigest()


def test_sizes_and_axes_are_read():
    assert parse_size("800x1216") == (800, 1216)
    assert parse_size("640") == (640, 640)
    assert parse_size(None) is None
    assert parse_dynamic(" Batch, size ") == ("batch", "size")
    assert parse_dynamic("none") == ()
    assert dynamic_for(parse_size("640")) == ("batch",)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_missing_software_is_an_extra_to_install(format, monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        detrcli.export("detr/tiny", weights="random", format=format)
    assert caught.value.hint == f"pip install 'detrcli[{format}]'"


class Awkward(nn.Module):
    """A detector whose head does something particular."""

    def __init__(self, does):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.head = nn.ModuleDict({"odd": Odd(does)})

    def forward(self, images, mask):
        x = self.head["odd"](self.conv(images).flatten(2).mT)
        return Output(x[:, :4, :4], x[:, :4, 4:].sigmoid())


class Odd(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does = does

    def forward(self, x):
        return self.does(x)


def program_of(does, **options):
    request = Request(format="onnx", **options)
    return trace(Graph(Awkward(does), request, PICTURES, lambda output, sizes: []), request, PICTURES)


@pytest.mark.parametrize(
    ("does", "operator"),
    [(torch.special.bessel_j0, "special_bessel_j0"), (lambda x: torch.linalg.qr(x)[0], "qr")],
    ids=["bessel", "qr"],
)
def test_an_operator_that_onnx_does_not_have_is_named_with_its_place(does, operator):
    pytest.importorskip("onnxscript")
    program = program_of(does, dynamic=(), size=(64, 96))
    about = Description(
        model="a/b", config={}, categories=Categories((), ()), preprocess=PICTURES, format="onnx"
    )
    with pytest.raises(ModelError, match=rf"{operator} of head\.odd has no ONNX form"):
        onnx_file.convert(program, about)


def test_an_operator_that_would_not_run_from_a_pt2_is_named(tmp_path):
    about = Description(
        model="a/b", config={}, categories=Categories((), ()), preprocess=PICTURES, format="pt2"
    )
    with pytest.raises(CheckpointError, match=r"it holds target 'torch\.ops\.aten\.special_bessel_j0"):
        program_file.write(tmp_path / "a.pt2", program_of(torch.special.bessel_j0), about)
    assert not list(tmp_path.iterdir())


def test_a_branch_on_values_is_named_with_its_place():
    with pytest.raises(ModelError, match=r"head\.odd does what no graph can hold"):
        program_of(lambda x: x if x.sum() > 0 else -x)


def test_an_axis_that_the_model_fixes_is_named():
    with pytest.raises(ModelError, match="fixes the batch that it is exported with") as caught:
        program_of(lambda x: x.new_zeros(len(x), x.shape[1], x.shape[2]) + x)
    assert "leave batch out of --dynamic" in caught.value.hint


def test_a_wrong_file_is_not_handed_over(weights, tmp_path, monkeypatch):
    """The file holds another model's weights: it loads and runs, but answers differently."""
    write = running.WRITERS["pt2"]

    def write_other(path, program, description):
        with torch.no_grad():
            program.state_dict["model.class_head.bias"].add_(0.01)
        write(path, program, description)

    monkeypatch.setitem(running.WRITERS, "pt2", write_other)
    out = tmp_path / "model.pt2"
    out.write_bytes(b"an older file")
    with pytest.raises(VerificationError, match="answers differently: one picture") as caught:
        detrcli.export(None, out, weights=weights)
    assert caught.value.exit_code == 5
    assert out.read_bytes() == b"an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "model.pt2.failed.json", "run"]
    assert '"passed": false' in (tmp_path / "model.pt2.failed.json").read_text()


def test_an_older_file_keeps_its_report_until_the_next_one_has_passed(weights, tmp_path, monkeypatch):
    out, write = tmp_path / "model.pt2", running.WRITERS["pt2"]
    failed = tmp_path / "model.pt2.failed.json"
    made = detrcli.export(None, out, weights=weights, **FIXED)
    older = made.report_file.read_text()
    assert json.loads(older)["sha256"] == {"model.pt2": hashlib.sha256(out.read_bytes()).hexdigest()}

    def write_no_numbers(path, program, description):
        with torch.no_grad():
            program.state_dict["model.class_head.bias"].fill_(math.nan)
        write(path, program, description)

    monkeypatch.setitem(running.WRITERS, "pt2", write_no_numbers)
    with pytest.raises(VerificationError, match="logits differ by nan") as caught:
        detrcli.export(None, out, weights=weights, **FIXED)
    assert str(failed) in caught.value.hint
    assert made.report_file.read_text() == older
    found = json.loads(failed.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["verification"]["largest"]["logits"] == "nan"
    assert found["verification"]["cases"][0]["largest"]["logits"] == "nan"
    monkeypatch.undo()
    detrcli.export(None, out, weights=weights, **FIXED)
    assert not failed.exists()


def write_junk(path, program, description):
    path.write_bytes(b"junk")
    path.with_suffix(".bin").write_bytes(b"junk")


def write_half_an_answer(path, program, description):
    class Half(nn.Module):
        def forward(self, images, mask):
            return {"logits": images.mean((1, 2, 3)) + mask.sum()}

    images, mask = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    axes = {"images": dict.fromkeys((0, 2, 3), Dim.DYNAMIC), "mask": dict.fromkeys((0, 1, 2), Dim.DYNAMIC)}
    running.WRITERS["onnx"](
        path, torch.export.export(Half(), (images, mask), dynamic_shapes=axes), description
    )


@pytest.mark.parametrize(
    ("suffix", "written", "said"),
    [
        (".onnx", write_junk, "model.onnx cannot be loaded"),
        (".pt2", write_junk, "model.pt2 cannot be loaded"),
        (".xml", write_junk, "model.xml cannot be loaded"),
        (".onnx", write_half_an_answer, "boxes"),
    ],
)
def test_a_file_that_its_own_runtime_does_not_run_has_failed(
    suffix, written, said, weights, tmp_path, monkeypatch
):
    format = plan.SUFFIXES[suffix]
    for package in plan.NEEDS[format]:
        pytest.importorskip(package)
    out = tmp_path / f"model{suffix}"
    writer = partial(written) if written is write_junk else anyhow(written, running.WRITERS["onnx"])
    monkeypatch.setitem(running.WRITERS, format, writer)
    with pytest.raises(VerificationError, match="the exported model does not work") as caught:
        detrcli.export(None, out, weights=weights)
    assert said in caught.value.message
    assert "making" not in caught.value.message + caught.value.hint
    report = json.loads((tmp_path / f"model{suffix}.failed.json").read_text())["verification"]
    assert report["reasons"][0] in caught.value.message
    assert not report["passed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"model{suffix}.failed.json", "run"]


def anyhow(written, writer):
    """A writer that calls the real one itself."""

    def write(path, program, description):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(running.WRITERS, "onnx", writer)
            written(path, program, description)

    return write


@pytest.mark.parametrize("name", ["model.bin", "model.xml.json", "model.xml.failed.json", "model.xml"])
def test_a_folder_in_the_way_is_seen_before_any_work(name, weights, tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / name).mkdir()
    done = detr("export", "--weights", weights, "--out", tmp_path / "model.xml")
    assert f"{name} is a folder" in done.error(2)
    assert "tracing" not in done.err


@pytest.mark.parametrize("setting", ["num_queries=7", "decoder_layers=1"])
def test_settings_that_the_weights_do_not_fit_are_refused(setting, weights, tmp_path):
    done = detr("export", "--weights", weights, "--set", setting, cwd=tmp_path)
    assert f"these weights do not fit a model with {setting}: " in done.error(2)
    assert "--weights random" in done.err


def test_only_what_the_system_refused_is_called_so(weights, tmp_path, monkeypatch):
    def fails(error):
        def write(path, program, description):
            raise error

        monkeypatch.setitem(running.WRITERS, "pt2", write)
        with pytest.raises(Exception) as caught:
            detrcli.export(None, tmp_path / "model.pt2", weights=weights)
        return caught.value

    for error in (RuntimeError(""), RecursionError("too deep")):
        assert fails(error) is error
    full = fails(OSError(errno.ENOSPC, "No space left on device"))
    assert (type(full), full.hint) == (DetrError, "free some space, or choose another --out")
    forbidden = fails(PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file"))
    assert forbidden.message.endswith("model.pt2: Permission denied: /elsewhere/file")
    assert "may write to" in forbidden.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("suffix", [".PT2", ".ONNX"])
def test_suffixes_may_be_capitals(suffix, weights, tmp_path):
    for package in plan.NEEDS[plan.SUFFIXES[suffix.lower()]]:
        pytest.importorskip(package)
    out = tmp_path / f"model{suffix}"
    assert detrcli.export(None, out, weights=weights, **FIXED).report.passed
    assert detrcli.load(str(out)).name == "detr/tiny"


def test_openvino_knows_small_letters_only(weights, tmp_path):
    pytest.importorskip("openvino")
    done = detr("export", "--weights", weights, "--out", tmp_path / "up.XML")
    assert "OpenVINO reads no file that ends in .XML" in done.error(2)
    assert "up.xml" in done.err


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(weights, monkeypatch):
    assert "cannot write" in detr("export", "--weights", weights, "--out", weights / "a.pt2").error(1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(DetrError, match="no permission"):
        detrcli.export(None, weights.parent / "a.pt2", weights=weights)


def test_a_full_disk_leaves_no_half_file(weights, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    out = tmp_path / "out" / "model.pt2"
    command = [sys.executable, "-m", "detrcli", "export", "--weights", str(weights), "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 1, run.stderr
    assert f"error: cannot write {out}" in run.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("domain", ["", "mmdeploy"])
def test_files_of_others_are_refused(domain, tmp_path):
    """Also those with operators that the runtime does not have: the file says what it is before it is loaded."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kind = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    same = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu" if not domain else "NMSRotated", ["x"], ["y"], domain=domain)
    graph = onnx.helper.make_graph([node], "g", [kind], [same])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("mmdeploy", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, tmp_path / "foreign.onnx")
    done = detr("predict", tmp_path, "--model", tmp_path / "foreign.onnx")
    assert "was not made by detr export: it does not say its classes" in done.error(4)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is empty"), (b"\x08", "ends in the middle"), (b"\x3a\x7fgraph", "ends in the middle"), (b"\xff" * 99, "no protobuf")],
)  # fmt: skip
def test_what_is_no_onnx_is_said_so(content, said, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"cannot be loaded: it.* {said.removeprefix('it ')}"):
        detrcli.load(str(path))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
def test_damaged_and_missing_files_are_said_so(suffix, tmp_path):
    for package in plan.RUNS[plan.SUFFIXES[suffix]]:
        pytest.importorskip(package)
    path = tmp_path / f"model{suffix}"
    with pytest.raises(CheckpointError, match="there is no file"):
        detrcli.load(str(path))
    path.write_bytes(b"\x08\x07 cut short")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        detrcli.load(str(path))


def test_each_process_takes_a_gpu_only_where_torch_computes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "running", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert api._device_of_rank(None, "detr/tiny") == api._device_of_rank(None, "a.pt2") == "cuda:1"
    assert api._device_of_rank(None, "a.onnx") is None
    assert api._device_of_rank("cuda", "a.onnx") == "cuda:1"
    monkeypatch.setenv("DETR_DEVICE", "")
    assert api._device_of_rank(None, "a.onnx") is None


def test_onnx_runtime_takes_the_gpu_that_is_named():
    assert providers(torch.device("cuda:1")) == [("CUDAExecutionProvider", {"device_id": 1})]
    assert providers(torch.device("cuda")) == [("CUDAExecutionProvider", {"device_id": 0})]
    assert providers(torch.device("cpu")) == ["CPUExecutionProvider"]


def test_weights_beside_an_exported_file_are_refused(tmp_path, weights):
    with pytest.raises(UsageError, match="holds its weights"):
        detrcli.load("model.onnx", weights=weights)


def test_an_exported_file_given_as_weights_is_told_its_option():
    with pytest.raises(UsageError, match="not weights") as told:
        detrcli.load("detr", weights="model.onnx")
    assert told.value.hint == "use --model model.onnx"


def test_lower_precision_is_chosen_when_exporting(make):
    predictor = detrcli.load(str(make("detr", ".pt2").file))
    with pytest.raises(UsageError, match="float32, as it was exported"):
        list(predictor.predict(torch.zeros(3, 64, 64, dtype=torch.uint8), amp=True))


@pytest.mark.parametrize(
    ("family", "side"), [("detr", 1), pytest.param("deformable_detr", 16, marks=pytest.mark.long)]
)
def test_pictures_that_are_too_small_are_said_so(family, side, make):
    """A program for sides of more than one pixel, and one that chooses 30 queries among its tokens."""
    model = detrcli.load(str(make(family, ".pt2").file)).model
    with pytest.raises(DetrError, match=f"cannot run on pictures of {side}x{side}"):
        model(torch.zeros(1, 3, side, side))


@pytest.mark.parametrize(
    ("does", "hint"),
    [
        (
            lambda images: torch.empty(2**60, dtype=torch.uint8),
            "give fewer pictures at a time, or smaller ones",
        ),
        (
            lambda images: images.flatten(1).topk(10**6),
            "give larger pictures: a map needs more than one place, and all",
        ),
        (lambda images: images @ torch.zeros(7, 7), "see whether a/b itself can, and export it again"),
    ],
    ids=["memory", "queries", "else"],
)
def test_what_to_do_follows_from_what_went_wrong(does, hint):
    about = Description(
        model="a/b", config={}, categories=Categories((), ()), preprocess=PICTURES, format="pt2"
    )
    with pytest.raises(DetrError, match="cannot run on pictures of 8x8") as caught:
        ExportedModel(lambda images, mask: {"logits": does(images)}, about, Path("a.pt2"))(
            torch.zeros(1, 3, 8, 8)
        )
    assert caught.value.hint.startswith(hint)


def test_help_and_refusals_do_not_load_torch(tmp_path):
    code = (
        "import sys; from detrcli.cli.app import app\n"
        "try: app(sys.argv[1:], standalone_mode=False)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "assert 'torch' not in sys.modules"
    )
    for arguments in (["export", "--help"], ["export", "-m", "detr/tiny", "--dynamic", "depth"]):
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr
    assert not list(Path(tmp_path).iterdir())
