"""The shell of the command line: light, quiet, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from detrcli.cli import app as shell
from detrcli.version import __version__
from tests.cli.run import detr

LIGHT = [
    ("--help",),
    ("--version",),
    ("zoo", "list"),
    ("zoo", "list", "--json"),
    ("zoo", "info", "detr"),
    ("runs", "list"),
    ("runs", "list", "--json"),
    *((verb, "--help") for verb in ("train", "eval", "predict", "env", "zoo", "data", "runs")),
]


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_light_commands_do_not_load_torch_or_pydantic(args):
    code = (
        "import sys; from detrcli.cli.app import app\n"
        f"try: app({list(args)!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'scipy', 'PIL', 'safetensors', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_does_not_load_torch():
    code = "import sys, detrcli; detrcli.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_completion_of_models_needs_no_torch():
    code = (
        "import sys; from detrcli.cli.complete import model_names\n"
        "assert 'detr/r50-dc5' in model_names('detr/r50'), model_names('detr')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version():
    assert detr("--version").out == f"detr {__version__}\n"


def test_every_paper_is_listed():
    listed = {row["name"] for row in detr("zoo", "list", "--json").json["models"]}
    assert {"detr/r50", "detr/r50-dc5", "detr/r101", "detr/r101-dc5", "detr/tiny"} <= listed


def test_env_explains_kernels_and_plugins():
    facts = detr("env", "--json").json
    assert facts["packages"]["detrcli"] == __version__
    assert "(" in facts["kernels"]["cpu"]
    assert "loaded" in facts["plugins"]["detr"]


@pytest.mark.parametrize(
    ("args", "says", "hints"),
    [
        (("train", "shapes", "--model", "deter/tiny"), "unknown model 'deter/tiny'", "detr"),
        (("train", "shapes", "--model", "detr/tyni"), "'tyni'", "'tiny'"),
        (("train", "shapes"), "needs data and a model", "--model"),
        (
            ("train", "shapes", "-m", "detr/tiny", "--set", "model.num_quereis=3"),
            "model.num_quereis",
            "model.num_queries",
        ),
        (
            ("train", "shapes", "-m", "detr/tiny", "--set", "recipe.lr=fast"),
            "recipe.lr needs a number",
            "recipe.lr=0.1",
        ),
        (("train", "shapes", "-m", "detr/tiny", "--set", "lr=1"), "cannot reach 'lr'", "recipe.lr"),
        (("train", "shapes", "-m", "detr/tiny", "--amp", "fp8"), "amp: 'fp8'", "fp16"),
        (("train", "shapes", "-m", "detr/tiny", "--device", "qpu"), "'qpu'", "cpu"),
        (
            ("train", "shapes", "-m", "detr/tiny", "--device-batch", "5"),
            "cannot be made of parts of 5",
            "divisor",
        ),
        (("train", "shpaes", "-m", "detr/tiny"), "shpaes", "shapes"),
        (("zoo", "info", "detr/r51"), "'r51'", "r50"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_a_mistake_is_one_line_and_a_hint(args, says, hints, tmp_path):
    done = detr(*args, cwd=tmp_path)
    assert says in done.error(2)
    assert hints in done.err.split("hint: ", 1)[1]


def test_errors_are_json_too(tmp_path):
    done = detr("train", "shapes", "--model", "deter", "--json", cwd=tmp_path)
    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert error["kind"] == "usage"
    assert "detr" in error["hint"]


def test_what_nobody_foresaw_says_what_to_type(monkeypatch, capsys):
    monkeypatch.setattr(shell, "app", lambda: 1 / 0)
    with pytest.raises(SystemExit):
        shell.main()
    assert "ZeroDivisionError" in (told := capsys.readouterr().err)
    assert "the same command after DETR_DEBUG=1" in told


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in detr("--debug", "train", "shapes", "--model", "deter", cwd=tmp_path).err


def test_an_unknown_flag_is_a_usage_error():
    done = detr("train", "--modle", "x")
    assert done.code == 2
    assert "Traceback" not in done.err
