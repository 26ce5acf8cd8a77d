"""A new paper as a package that installs, trains and passes the conformance kit as it is: what `detr zoo new` writes."""

from __future__ import annotations

import keyword
import re
from datetime import date
from importlib.resources import files
from pathlib import Path
from string import Template

from detrcli.errors import DetrError, UsageError
from detrcli.plugins.contract import API
from detrcli.plugins.registry import find, fold, models

# parameters of the two variants of the template's model, counted; a test counts again
BASE_PARAMS, TINY_PARAMS = 30_532_895, 176_727


def scaffold(name: str, folder: Path, title: str | None = None) -> tuple[str, list[Path]]:
    """Write the package of a paper called `name` (`my-paper`) into `folder`; its family name and the files written."""
    family = fold(name)
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", family):
        raise UsageError(
            f"{name!r} cannot be a model's name", hint="use letters, digits and single dashes: sparse-detr"
        )
    taken = {fold(m.family.name) for m in models()} | {fold(f.name) for f in find()}
    if family in taken:
        raise UsageError(f"a model called {family!r} is installed already", hint="choose another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", hint="choose another place with --out")
    values = _values(family, title)
    if keyword.iskeyword(values["cls"]) or values["cls"] in _imported():
        raise UsageError(
            f"{name!r} cannot be a model's name: its class {values['cls']} would hide another",
            hint="add a word: sparse-detr",
        )
    return family, [_write(folder / path, source, values) for path, source in _layout(family).items()]


def _values(family: str, title: str | None) -> dict[str, str]:
    words = family.split("_")
    return {
        "family": family,
        "package": f"detrcli_{family}",
        "distribution": f"detrcli-{family.replace('_', '-')}",
        "cls": "".join(word.capitalize() for word in words),
        "title": _plain(title) if title else " ".join(word.capitalize() for word in words),
        "year": f"{date.today().year}",
        "api": f"{API}",
        "base_params": f"{BASE_PARAMS:_}",
        "tiny_params": f"{TINY_PARAMS:_}",
    }


def _imported() -> set[str]:
    """What the templates import, which a class of the same name would hide."""
    texts = (_template(f"{name}.py.txt") for name in ("config", "model", "plugin"))
    lines = (line.partition(" import ")[2] for text in texts for line in text.splitlines())
    return {name for line in lines for name in re.findall(r"\w+", line)}


def _plain(title: str) -> str:
    """A title stands inside TOML and Python texts."""
    if not title.isprintable() or '"' in title or "\\" in title:
        raise UsageError(f"the title {title!r} cannot be used", hint='leave out ", \\ and line breaks')
    return title


def _layout(family: str) -> dict[str, str]:
    """Every file of the package and the template it is made from."""
    package = f"detrcli_{family}"
    return {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{package}/__init__.py": "init.py.txt",
        f"{package}/py.typed": "",
        f"{package}/{family}.md": "card.md.txt",
        f"{package}/golden.json": "golden.json.txt",
        f"{package}/config.py": "config.py.txt",
        f"{package}/model.py": "model.py.txt",
        f"{package}/plugin.py": "plugin.py.txt",
        f"tests/test_{family}.py": "test.py.txt",
    }


def _template(source: str) -> str:
    return (files("detrcli.plugins") / "template" / source).read_text(encoding="utf-8")


def _write(path: Path, source: str, values: dict[str, str]) -> Path:
    text = _template(source) if source else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(text).substitute(values), encoding="utf-8")
    except OSError as error:
        raise DetrError(
            f"cannot write {path}: {error.strerror}", hint="choose another place with --out"
        ) from error
    return path
