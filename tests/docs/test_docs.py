"""What the documentation says is run: commands, Python, and the generated pages against the program."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from detrcli.plugins import models, resolve
from tests.cli.run import detr

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "models").glob("*.md")),
]
PAGES = [page for page in PAGES if page.name not in ("cli.md", "zoo.md")]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language; one that cannot run says so: ```console no-run: why."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a reader has it after the first steps: pictures, a trained model."""
    folder = tmp_path_factory.mktemp("reader")
    env = {"DETR_RUNS": "runs"}
    assert detr("data", "shapes", "my_data", "--train", "24", "--val", "8", cwd=folder, env=env).code == 0
    first = min((folder / "my_data" / "val").iterdir())
    (folder / "img.jpg").write_bytes(_jpeg(first))
    for model in ("detr/tiny", "lite_deformable/tiny", "deformable_detr/tiny"):
        done = detr("train", "my_data", "--model", model, "--steps", "2", cwd=folder, env=env)
        assert done.code in (0, 2), done.err
    return folder


def _jpeg(path: Path) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda p: p.stem)
def test_commands_of_a_page_run(page, workplace):
    for block in blocks(page, "console"):
        for line in block.splitlines():
            if line.startswith("$ detr "):
                done = detr(
                    *shlex.split(line.removeprefix("$ detr "), comments=True),
                    cwd=workplace,
                    env={"DETR_RUNS": "runs"},
                )
                assert done.code == 0, f"{line}\n{done.err}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_of_a_page_runs(page, workplace):
    code = "\n".join(blocks(page, "python"))
    run = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
        cwd=workplace,
        env=os.environ | {"DETR_RUNS": "runs"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def test_the_command_reference_is_up_to_date(generate):
    assert (ROOT / "docs" / "cli.md").read_text() == generate.commands()
    assert not generate.unlinked()


def test_the_table_of_models_has_the_default_of_each_family_as_it_is_counted(generate):
    """One of five models; the others, and the picture of them all, take a minute or two."""
    page, known = (ROOT / "docs" / "zoo.md").read_text(), {model.name for model in models()}
    for name in sorted({resolve(name.partition("/")[0]).name for name in known}):
        row = generate._table([resolve(name)])[2]
        assert row in page
    assert set(re.findall(r"^\| \[?`([^`]+)`", page, re.MULTILINE)) == known


@pytest.mark.long
def test_generated_pages_are_up_to_date():
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "docs" / "zoo.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_environment_variable_is_documented():
    sources = [p.read_text() for folder in ("detrcli", "zoo") for p in (ROOT / folder).rglob("*.py")]
    used = set(re.findall(r'"(DETR_[A-Z]+)"', "\n".join(sources)))
    documented = (ROOT / "docs" / "environment.md").read_text()
    assert not [name for name in sorted(used) if name not in documented]


def test_every_exit_code_is_documented():
    from detrcli import errors

    page = (ROOT / "docs" / "errors.md").read_text()
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.DetrError)]
    assert not [k.__name__ for k in kinds if f"`{k.__name__}`" not in page]
