"""`detr zoo new`: what it writes installs, passes the conformance kit and is clean, as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from detrcli.errors import DetrError, UsageError
from detrcli.plugins.scaffold import scaffold
from tests.environments import environment

ROOT = Path(__file__).parents[2]


def test_a_new_package_is_short_and_clean(tmp_path: Path):
    _, written = scaffold("Sparse-DETR", tmp_path, "Sparse DETR: Fewer Tokens")
    by_hand = [path for path in written if path.name != "golden.json"]  # which a command writes
    assert sum(len(path.read_text().splitlines()) for path in by_hand) <= 210
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), "."]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_a_new_package_installs_in_a_clean_environment_and_keeps_every_promise(tmp_path: Path):
    family, _ = scaffold("Sparse-DETR", tmp_path / "new", "Sparse DETR: Fewer Tokens")
    assert family == "sparse_detr"
    env = environment(tmp_path / "place", tmp_path / "new")
    page = env.run("detr", "zoo", "info", "sparse_detr", cwd=tmp_path)
    assert "Sparse DETR: Fewer Tokens" in page
    assert "## Departures" in page  # the card travels in the package
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", tmp_path / "new")
    said = env.run("python", "-m", "pytest", *options, tmp_path / "new" / "tests", cwd=tmp_path)
    assert "passed" in said


@pytest.mark.parametrize("name", ["", "9lives", "a b", "../up", "a--b", "détr", "a/b", "-x", "import.me"])
def test_names_that_cannot_be_typed_are_refused(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="cannot be a model's name"):
        scaffold(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["none", "true", "backbone", "output", "tensor", "variant"])
def test_names_whose_class_would_hide_another_are_refused(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="would hide another"):
        scaffold(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_that_are_taken_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="installed already"):
        scaffold("DETR", tmp_path / "new")


@pytest.mark.parametrize("title", ['a "quoted" one', "two\nlines", "back\\slash"])
def test_titles_that_would_break_the_files_are_refused(tmp_path: Path, title: str):
    with pytest.raises(UsageError, match="title"):
        scaffold("fresh", tmp_path / "new", title)


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        scaffold("fresh", tmp_path)
    with pytest.raises(UsageError, match="not empty"):
        scaffold("fresh", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DetrError, match="cannot write"):
        scaffold("fresh", tmp_path / "file" / "new")
