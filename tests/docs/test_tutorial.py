"""docs/add-a-paper.md: its package builds, installs into a clean environment, passes, trains, and is what the page quotes."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.environments import Environment, environment

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "add-a-paper.md").read_text()
PACKAGE = DOCS / "tutorial" / "detrcli_anchor_detr"
SHORTER = {
    "train": ("--steps", "6", "--batch-size", "4"),
    "profile": ("--size", "64x64"),
    "predict": ("--conf", "0"),
}


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Where the package is installed, built from a copy outside the checkout."""
    folder = tmp_path_factory.mktemp("tutorial")
    return environment(folder, Path(shutil.copytree(DOCS / "tutorial", folder / "package")))


def test_nothing_of_the_checkout_is_used(env: Environment, tmp_path: Path):
    code = "import detrcli, detrcli_detr, detrcli_anchor_detr as a; print(detrcli.__file__, detrcli_detr.__file__, a.__file__)"
    for place in env.run("python", "-c", code, cwd=tmp_path).split():
        assert Path(place).is_relative_to(env.folder)
    ways = env.detr("env", cwd=tmp_path), env.run("detr", "env", cwd=tmp_path)
    first, second = ([line for line in said.splitlines() if "(measured)" not in line] for said in ways)
    assert first == second
    assert any("anchor_detr" in line for line in first)


@pytest.mark.long
def test_the_package_keeps_every_promise_and_its_own_laws(env: Environment, tmp_path: Path):
    shutil.copytree(DOCS / "tutorial" / "tests", tmp_path / "tests")
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "tests")
    assert "passed" in env.run("python", "-m", "pytest", *options, cwd=tmp_path)


def commands() -> list[list[str]]:
    """The commands of the section on its use."""
    section = PAGE.partition("## 6. Use it")[2].partition("## 7.")[0]
    return [shlex.split(line) for line in re.findall(r"^\$ detr (.*)$", section, re.MULTILINE)]


def test_every_command_of_the_page_works(env: Environment, tmp_path: Path):
    """With fewer steps and a smaller picture than the page has."""
    Image.new("RGB", (96, 64), "red").save(tmp_path / "img.jpg")
    said = {}
    for command in commands():
        if command[0] == "export" and find_spec("onnxscript") is None:
            continue  # an extra
        options = SHORTER.get(command[0], ())
        said[command[0]] = env.detr(*command, *options, cwd=tmp_path, DETR_RUNS="runs")
    assert said.keys() - {"export"} == {"zoo", "train", "eval", "profile", "predict"}
    assert "queries that are points" in said["zoo"]
    assert "AP" in said["eval"]
    assert "anchor_detr/tiny" in said["profile"]
    assert list(tmp_path.glob("runs/predict/*/img.jpg"))
    assert ("export" in said) == (tmp_path / "anchor.onnx").is_file()


def quotes() -> list[tuple[str, str]]:
    """(file, fragment) of every python block of the page that names its file."""
    found = []
    for block in re.findall(r"```python [^\n]*\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        found += [
            (block[0], part.strip("\n")) for part in re.split(r"^ *\.\.\.\n", block[1], flags=re.MULTILINE)
        ]
    return found


def test_the_page_quotes_something():
    assert {name for name, _ in quotes()} == {
        "config.py",
        "model.py",
        "plugin.py",
        "tests/test_anchor_detr.py",
    }


@pytest.mark.parametrize(("name", "fragment"), quotes())
def test_what_the_page_quotes_stands_in_the_package(name: str, fragment: str):
    path = DOCS / "tutorial" / name if name.startswith("tests") else PACKAGE / name
    assert fragment in path.read_text()
