"""docs/add-a-paper.md: its package builds, installs, passes, trains, and is what the page quotes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo.test_scaffold import install

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = DOCS / "tutorial" / "detrcli_anchor_detr"


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the package is installed, built from a copy outside the checkout."""
    folder = tmp_path_factory.mktemp("tutorial")
    source = shutil.copytree(DOCS / "tutorial", folder / "source")
    return install(source, folder / "site")


def run(env: dict[str, str], cwd: Path, command: str) -> str:
    command = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_keeps_every_promise_and_its_own_laws(env: dict[str, str], tmp_path: Path):
    shutil.copytree(DOCS / "tutorial" / "tests", tmp_path / "tests")
    run(env | {"DETR_PLUGINS": "detr,anchor_detr"}, tmp_path, "pytest -q -p no:cacheprovider tests")


def test_the_package_is_listed_trains_is_profiled_and_evaluated(env: dict[str, str], tmp_path: Path):
    env = env | {"DETR_RUNS": str(tmp_path / "runs")}
    assert "queries that are points" in run(env, tmp_path, "detrcli zoo info anchor_detr")
    run(env, tmp_path, "detrcli train shapes --model anchor_detr/tiny --steps 6 --batch-size 4")
    path = run(env, tmp_path, "detrcli zoo path anchor_detr").strip()
    assert path.startswith(str(tmp_path / "runs"))
    profiled = run(env, tmp_path, "detrcli profile --model anchor_detr/tiny --size 64x64")
    assert "anchor_detr/tiny" in profiled
    assert "AP" in run(env, tmp_path, "detrcli eval shapes --model anchor_detr/tiny")


def quotes() -> list[tuple[str, str]]:
    """(file, fragment) of every python block of the page that names its file."""
    found = []
    for block in re.findall(
        r"```python [^\n]*\n# (\S+)\n(.*?)```", (DOCS / "add-a-paper.md").read_text(), re.DOTALL
    ):
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
