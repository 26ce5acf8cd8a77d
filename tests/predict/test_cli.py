"""`detr predict` from the outside: streams, files, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from detrcli.predict import load as load_module
from detrcli.predict import run as run_module
from tests import commands
from tests.cli.run import detr as process
from tests.spotter import scene, spotter
from tests.tiny import write_run

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/predict.schema.json").read_text())


@pytest.fixture
def detr(capsys, monkeypatch, tmp_path):
    """The command with a model that finds what is known to be there."""
    write_run(Path(os.environ["DETR_RUNS"]) / "train" / "detr-tiny-1")
    monkeypatch.setattr(load_module, "load", lambda choice, device: spotter())
    monkeypatch.chdir(tmp_path)
    return lambda *args: commands.detr("predict", *args, capsys=capsys, monkeypatch=monkeypatch)


@pytest.fixture
def pictures(tmp_path):
    for name in ("one.png", "two.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        scene().save(tmp_path / "in" / name)
    return tmp_path / "in"


def test_a_picture_in_a_picture_and_json_out(detr, pictures, tmp_path):
    ended = detr(pictures / "one.png", "--model", "detr")
    assert ended.code == 0
    assert ended.out == ""
    assert "detr/tiny: the newest finished run" in ended.err
    assert (
        "1 picture: 1 red spot, 1 blue spot" in ended.err or "1 picture: 1 blue spot, 1 red spot" in ended.err
    )
    [folder] = Path(os.environ["DETR_RUNS"]).glob("predict/*")
    assert folder.name == "spotter-plain-1"
    assert str(folder) in ended.err
    assert {p.name for p in folder.iterdir()} == {"one.png", "predictions.json"}
    detr(pictures / "one.png", "--model", "detr")
    assert (folder.parent / "spotter-plain-2").is_dir()


def test_json_is_one_document_on_stdout(detr, pictures, tmp_path):
    ended = detr(pictures, "--model", "detr", "--json", "--out", tmp_path / "out", "--format", "csv")
    document = json.loads(ended.out)
    jsonschema.validate(document, SCHEMA)
    assert [Path(image["source"]).name for image in document["images"]] == ["one.png", "two.png"]
    assert document["out"] == str(tmp_path / "out")
    assert "stem" not in document["images"][0]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predictions.csv"}
    ended = detr(*[pictures / "one.png"] * 2, "--model", "detr", "--json", "--out", tmp_path / "drawn")
    document = json.loads(ended.out)
    jsonschema.validate(document, SCHEMA)
    assert [image["stem"] for image in document["images"]] == ["one", "one-2"]


def test_the_document_holds_what_decides_what_is_found(detr, pictures, tmp_path):
    detr(pictures, "-m", "detr", "--classes", "red spot,17", "--batch", 2, "--conf", 0.5, "--out", "out")
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert document["settings"] == {
        "conf": 0.5, "top": None, "classes": ["red spot", "17"], "max_size": None, "tile": None, "batch": 2, "amp": "off",
    }  # fmt: skip


def test_lines_go_to_stdout_and_nothing_to_disk(detr, pictures):
    ended = detr(pictures, "--model", "detr", "--out", "-")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        jsonschema.validate(line, SCHEMA)
    assert not (Path(os.environ["DETR_RUNS"]) / "predict").exists()
    assert detr(pictures, "--model", "detr", "--out", "-", "--json").code == 2


def test_a_failed_input_does_not_stop_the_rest(detr, pictures, capsys, monkeypatch):
    (pictures / "bad\n.png").write_bytes(b"oops")
    ended = detr(pictures, pictures / "gone.png", "--model", "detr", "--json")
    assert ended.code == 6
    document = json.loads(ended.out)
    assert len(document["images"]) == 2
    assert [Path(f["source"]).name for f in document["failures"]] == ["bad\n.png", "gone.png"]
    assert "no such file" in document["failures"][1]["error"]
    plain = detr(pictures, "--model", "detr")
    assert plain.code == 6
    assert "error: 1 of 3 inputs failed" in plain.err
    assert "bad\\n.png: not a picture" in plain.err
    quiet = commands.detr(
        "-q", "predict", pictures, "-m", "detr", "--format", "csv", capsys=capsys, monkeypatch=monkeypatch
    )
    assert quiet.code == 6
    assert [line.split(":")[0] for line in quiet.err.splitlines()] == ["failed", "error"]
    assert "bad\\n.png: not a picture" in quiet.err


def test_nothing_readable_is_a_data_error(detr, pictures, tmp_path):
    ended = detr(pictures / "gone.png", "--model", "detr")
    assert ended.code == 3
    assert f"error: {pictures}/gone.png: no such file" in ended.err
    (tmp_path / "empty").mkdir()
    ended = detr(tmp_path / "empty", "--model", "detr", "--json")
    assert ended.code == 3
    assert "no picture" in json.loads(ended.out)["failures"][0]["error"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "jsn"], "unknown output format 'jsn'"),
        (["--classes", "red sport"], "unknown class 'red sport'"),
        (["--conf", "1.5"], "conf"),
        (["--amp", "fp8"], "amp"),
        (["--tile", "3"], "tile"),
        (["--out", "-", "--format", "jsonl,csv"], "--out - writes JSON lines on stdout, no csv"),
    ],
)
def test_a_wrong_value_is_a_usage_error(detr, pictures, flags, said):
    ended = detr(pictures, "--model", "detr", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not (Path(os.environ["DETR_RUNS"]) / "predict").exists()


def test_what_is_in_a_folder_is_never_overwritten(detr, pictures, tmp_path):
    before = (pictures / "one.png").read_bytes()
    ended = detr(pictures / "one.png", "--model", "detr", "--out", pictures)
    assert ended.code == 1
    assert "never overwritten" in ended.err
    assert "choose another --out" in ended.err
    assert (pictures / "one.png").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert detr(pictures, "--model", "detr", "--out", tmp_path / "empty").code == 0


def test_pictures_that_were_drawn_are_not_looked_at_again(detr, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_RUNS", "runs")
    write_run(Path("runs/train/detr-tiny-1"))
    for _ in range(2):
        ended = detr(".", "-r", "**/*.png", "--model", "detr", "--json")
        sources = [image["source"] for image in json.loads(ended.out)["images"]]
        assert sources == ["in/one.png", "in/two.png"] * 2


def test_one_document_and_lines_do_not_share_stdout(detr, pictures):
    ended = detr(pictures, "--model", "detr", "--out", "-", "--json")
    assert ended.code == 2
    assert "both want stdout" in json.loads(ended.out)["error"]["message"]


def test_every_option_reaches_the_predictor(detr, pictures, monkeypatch):
    seen = {}

    def predict(self, sources, **options):
        seen.update(options)
        return iter(())

    monkeypatch.setattr(run_module.Predictor, "predict", predict)
    flags = ["--conf", 0.6, "--top", 3, "--classes", "3,17", "--max-size", 640, "--batch", 4, "--tile", 800]
    flags += ["--amp", "bf16", "--device", "cpu", "-r", "--out", "out"]
    assert detr(pictures, "--model", "detr", *flags).code == 0
    del seen["on_failure"]
    assert seen == {
        "conf": 0.6,
        "top": 3,
        "classes": ["3", "17"],
        "max_size": 640,
        "batch": 4,
        "amp": True,
        "tile": 800,
        "recursive": True,
        "leave_out": [Path(os.environ["DETR_RUNS"]) / "predict", Path("out")],
    }


@pytest.fixture
def run(tmp_path):
    """A finished run of detr/tiny in ./runs."""
    return write_run(tmp_path / "runs" / "train" / "detr-tiny-1")


def test_the_newest_run_of_a_model_is_used_and_named(run, pictures, tmp_path):
    env = {"DETR_RUNS": "runs", "HF_HUB_OFFLINE": "1"}
    ended = process(
        "predict", pictures / "one.png", "-m", "detr/tiny", "--conf", "0", "--top", "3", cwd=tmp_path, env=env
    )
    assert ended.code == 0, ended.err
    assert "the newest finished run of detr/tiny: runs/train/detr-tiny-1/best.safetensors" in ended.err
    document = json.loads((tmp_path / "runs/predict/detr-tiny-1/predictions.json").read_text())
    assert len(document["images"][0]["detections"]) == 3


def test_without_weights_the_ways_on_are_named(pictures, tmp_path):
    ended = process(
        "predict", pictures / "one.png", "-m", "detr/tiny", cwd=tmp_path, env={"DETR_RUNS": "runs"}
    )
    assert "no weights for detr/tiny" in ended.error(4)
    for way in ("detr train DATA --model detr/tiny", "detr zoo convert", "--weights"):
        assert way in ended.err


PIPED = [sys.executable, *["-m", "detrcli", "predict", "-", "-m", "detr/tiny", "--conf", "0", "--out", "-"]]


def test_a_reader_that_goes_away_ends_it_quietly(run, pictures, tmp_path):
    names = f"{pictures}/one.png\n" * 400
    command = [*PIPED[:3], "-q", *PIPED[3:]]
    env = os.environ | {"DETR_RUNS": "runs", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        child.stdin.write(names)
        child.stdin.close()
        assert json.loads(child.stdout.readline())["source"].endswith("one.png")
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_whole_files(run, pictures, tmp_path, name, code):
    """Records are in the files as they come, and the documents are closed however the process is told to end."""
    number = getattr(signal, name)
    command = [
        sys.executable,
        "-m",
        "detrcli",
        "predict",
        *[str(pictures / "one.png")] * 3000,
        "-m",
        "detr/tiny",
    ]
    command += ["--conf", "0", "--top", "2", "--format", "json,coco,csv", "--out", "out"]
    env = os.environ | {"DETR_RUNS": "runs", "OMP_NUM_THREADS": "1"}

    def heard() -> None:  # under nohup SIGHUP would be passed over, and rightly
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as child:
        growing, until = tmp_path / "out" / "predictions.csv", time.monotonic() + 60
        while not (growing.exists() and "one.png" in growing.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        child.send_signal(number)
        said = child.stderr.read()
        assert child.wait(60) == code, said
    assert "Traceback" not in said
    done = len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"])
    assert 0 < done < 3000
    others = len(json.loads((tmp_path / "out" / "coco_images.json").read_text())["images"])
    assert done - 1 <= others <= done  # the last record may not have come to all of them
    assert 2 * done - 2 <= len(json.loads((tmp_path / "out" / "coco_results.json").read_text())) <= 2 * done
    assert 2 * done - 2 <= len(growing.read_text().splitlines()) - 1 <= 2 * done


def test_a_signal_ends_what_waits_for_more_names(run, pictures, tmp_path):
    env = os.environ | {"DETR_RUNS": "runs", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(PIPED, cwd=tmp_path, env=env, text=True, **pipes) as child:
        child.stdin.write(f"{pictures / 'one.png'}\n")
        child.stdin.flush()
        assert "one.png" in child.stdout.readline()
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143
        assert "Fatal" not in child.stderr.read()
