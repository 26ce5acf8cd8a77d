"""House rules that can be checked by reading: imports point down, light modules stay light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# floor by floor, from the ground; a module may import its own floor's packages listed with it, and lower ones
FLOORS = [
    {
        "version",
        "errors",
        "types",
        "boxes",
        "distributed",
        "ending",
        "launch",
        "meeting",
        "ops",
        "processors",
        "files",
        "runs",
        "toml",
    },
    {"config", "plugins", "postprocess", "nn", "report"},
    {"data", "weights", "models", "zoo", "environment"},
    {"evaluate", "predict", "profile", "export"},
    {"train", "testing"},
    {"api"},
    {"cli"},
]
CITATIONS = {
    "detrcli_detr": set(),
    "detrcli_deformable_detr": {"detrcli_detr"},
    "detrcli_lite_detr": {"detrcli_deformable_detr", "detrcli_detr"},
    "detrcli_d2etr": {"detrcli_deformable_detr", "detrcli_detr"},
    "detrcli_dynamic_detr": {"detrcli_detr"},
}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "pycocotools",
    "safetensors",
    "huggingface_hub",
    "PIL",
    "rich",
}
LIGHT = [
    "detrcli/cli",
    "detrcli/plugins",
    "detrcli/errors.py",
    "detrcli/config.py",
    "detrcli/types.py",
    "detrcli/runs",
]
LIGHT += ["detrcli/version.py", "detrcli/models.py", "detrcli/__init__.py", "detrcli/weights/keymap.py"]


def floor_of(package):
    return next(i for i, names in enumerate(FLOORS) if package in names)


def imports(path, *, top_only=False):
    """Dotted names a file imports; type-only imports do not count."""
    tree = ast.parse(path.read_text())
    hidden = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    if top_only:
        hidden += [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    skip = {id(x) for n in hidden for x in ast.walk(n)}
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


CORE = sorted((ROOT / "detrcli").rglob("*.py"))
PAPERS = sorted((ROOT / "zoo").rglob("*.py"))


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_point_down(path):
    own = path.relative_to(ROOT / "detrcli").parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imports(path):
        head, *rest = name.split(".")
        assert not (head.startswith("detrcli_") and head != "detrcli_ops"), f"core imports the paper {head}"
        if (
            head == "detrcli"
            and rest
            and (ROOT / "detrcli" / rest[0]).with_suffix("").name in set().union(*FLOORS)
        ):
            assert floor_of(rest[0]) <= floor_of(own), f"{own} imports {rest[0]}, which stands above it"


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_papers_import_core_and_what_they_cite(path):
    own = path.relative_to(ROOT / "zoo").parts[0]
    for name in imports(path):
        head, *rest = name.split(".")
        if head.startswith("detrcli_") and head != own:
            assert head in CITATIONS[own], f"{own} does not cite {head}"
        if head == "detrcli" and rest:
            assert rest[0] not in {
                "cli",
                "train",
                "evaluate",
                "predict",
                "profile",
                "export",
                "testing",
                "data",
            }, name


def test_the_native_wheel_stands_alone():
    for path in (ROOT / "detrcli_ops" / "src").rglob("*.py"):
        assert not [n for n in imports(path) if n.split(".")[0] == "detrcli"], path


def light_files():
    for place in LIGHT:
        path = ROOT / place
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for paper in sorted((ROOT / "zoo").iterdir()):
        yield from (f for f in (paper / "plugin.py", paper / "config.py", paper / "keymap.py") if f.exists())


@pytest.mark.parametrize("path", list(light_files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_light_modules_import_nothing_heavy(path):
    heavy = [n for n in imports(path, top_only=True) if n.split(".")[0] in HEAVY]
    assert not heavy, f"import {', '.join(heavy)} inside the function that needs it"
