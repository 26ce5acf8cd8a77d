"""An exported file predicts and is evaluated like the model that it came from, through the real command."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detrcli.export import run
from detrcli.export.plan import Request
from detrcli.export.runtime import ExportedModel
from detrcli.export.verify import Pair, Report
from detrcli.nn.inference import infer
from detrcli.plugins import resolve
from tests.cli.run import detr
from tests.export.conftest import weights_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "data"
    assert detr("data", "shapes", folder, "--train", "1", "--val", "5").code == 0
    return folder


@pytest.mark.parametrize("family", ["detr", "d2etr"])  # d2etr's scores need more than logits and boxes
def test_predict_finds_the_same(family, make, pictures, tmp_path):
    exported = make(family)
    ways = {"file": ("--model", exported.file), "weights": ("--weights", weights_of(exported))}
    found = {}
    for name, way in ways.items():
        done = detr("predict", pictures / "val", *way, "--conf", "0", "--json", "--out", tmp_path / name)
        assert done.code == 0, done.err
        found[name] = [d for image in done.json["images"] for d in image["detections"]]
    assert len(found["file"]) == len(found["weights"]) > 0
    for ours, theirs in zip(found["weights"], found["file"], strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["box"] == pytest.approx(theirs["box"], abs=1e-2)


def test_eval_gives_the_same_numbers(make, pictures, tmp_path):
    exported = make("detr")
    ways = {"file": ("--model", exported.file), "weights": ("--weights", weights_of(exported))}
    metrics = {}
    for name, way in ways.items():
        options = ("--batch-size", "2", "--json", "--out", tmp_path / name)
        done = detr("eval", pictures, *way, *options)
        assert done.code == 0, done.err
        metrics[name] = done.json["metrics"]
    assert metrics["file"] == pytest.approx(metrics["weights"], abs=1e-6)


def test_a_file_runs_without_what_made_it(make, pictures):
    """Of the software for ONNX only the runtime is needed."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('onnx', 'onnxscript'))\n"
        "import detrcli; print(len(list(detrcli.load(sys.argv[1]).predict(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, make("detr").file, pictures / "val"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "5\n"


def test_the_command_writes_file_and_report_and_compares_ap(pictures, make, tmp_path):
    out = tmp_path / "new" / "detr.pt2"
    weights = weights_of(make("detr"))
    done = detr(
        "export", "--weights", weights, "--out", out, "--verify-data", pictures, "--limit", "3", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["verification"]["passed"]
    assert done.json["verification"]["ap"]["images"] == 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["detr.pt2", "detr.pt2.json"]
    assert json.loads((out.parent / "detr.pt2.json").read_text())["format"] == "pt2"
    with zipfile.ZipFile(out) as archive:
        inside = b"".join(archive.read(name) for name in archive.namelist())
    for place in (ROOT, Path(sys.prefix), Path(torch.__file__).parent, tmp_path):
        assert str(place).encode() not in inside, "the file tells about this machine"


def test_ap_is_compared_on_the_pictures_that_a_file_of_one_size_gets(monkeypatch):
    """A tall picture is made smaller for a wide file; the model must see the small one, too."""
    subject, request = run.untrained(resolve("detr/tiny")), Request(format="onnx", dynamic=(), size=(64, 96))
    module = subject.module.eval()

    def session(images, mask):
        assert images.shape[2:] == request.size
        answer = infer(module, images, mask)
        return {"logits": answer.logits, "boxes": answer.boxes}

    def scored(module, data, **options):
        answer = infer(
            module, torch.ones(1, 3, 128, 64).cumsum(2) / 99, torch.zeros(1, 128, 64, dtype=torch.bool)
        )
        return SimpleNamespace(metrics={"ap": float(answer.logits.std())})

    monkeypatch.setattr(run, "evaluate", scored)
    file = ExportedModel(session, run.describe(subject, request), Path("file.onnx"))
    pair = Pair(
        model=module,
        exported=file,
        after=None,
        exported_after=None,
        preprocess=subject.preprocess,
        request=request,
    )
    report = run.with_ap(Report((), {}), pair, subject, [])
    assert report.ap["model"] == report.ap["file"] > 0
