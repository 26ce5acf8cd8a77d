"""Writes the pages that come from the program: the command reference and the table of models; links papers' pages into them.

python docs/generate.py            rewrite them
python docs/generate.py --check    exit 1 when one is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from typer.cli import get_docs_for_click
from typer.core import TyperGroup
from typer.main import get_command

from detrcli.cli.app import app
from detrcli.plugins import Model, models

HERE = Path(__file__).parent
NOTE = "<!-- written by `make docs`; changes are lost -->\n\n"


def commands() -> str:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    context: Any = group.context_class(group, info_name="detr")
    return (
        NOTE
        + get_docs_for_click(obj=group, ctx=context, name="detr", title="The command line").strip()
        + "\n"
    )


def zoo() -> str:
    lines = [
        "# Models",
        "",
        "AP and GFLOPs are *published*: the papers' or their repositories', on COCO val2017, with their source. Parameters are",
        "*counted* by building the model. Nothing here was measured on COCO by this project.",
        "",
    ]
    papers: dict[str, list[Model]] = {}
    for model in models():
        papers.setdefault(f"{model.paper.title} ({model.paper.venue} {model.paper.year})", []).append(model)
    for title, rows in papers.items():
        lines += [f"## {title}", "", f"<{rows[0].paper.url}>", "", *_table(rows), ""]
    return NOTE + "\n".join(lines)


def _table(rows: list[Model]) -> list[str]:
    head = ["model", "parameters", "published AP", "published GFLOPs", "source", "weights"]
    body = [[_link(m), f"{m.variant.params:,}", *_published(m), _weights(m)] for m in rows]
    return [_row(head), _row(["---", "---:", "---:", "---:", "---", "---"]), *map(_row, body)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _link(model: Model) -> str:
    page = HERE / "models" / f"{model.family.name}.md"
    return f"[`{model.name}`](models/{page.name})" if page.exists() else f"`{model.name}`"


def _published(model: Model) -> list[str]:
    p = model.variant.published
    if p is None:
        return ["", "", ""]
    return [f"{p.ap:g}" if p.ap else "", f"{p.gflops:g}" if p.gflops else "", p.source]


def _weights(model: Model) -> str:
    return ", ".join(f"{w.repo} ({w.license})" for w in model.variant.weights)


PAGES = {"cli.md": commands, "zoo.md": zoo}


def unlinked() -> dict[Path, Path]:
    """Pages that their paper's package does not carry yet (`detr zoo info` shows them): link -> page."""
    packages = {m.family.name: m.found.entry_point.module.partition(".")[0] for m in models()}
    pages = [page for page in sorted((HERE / "models").glob("*.md")) if page.stem in packages]
    links = {HERE.parent / "zoo" / packages[page.stem] / page.name: page for page in pages}
    return {link: page for link, page in links.items() if not link.exists()}


def main() -> int:
    stale = [
        name
        for name, make in PAGES.items()
        if (HERE / name).exists() is False or (HERE / name).read_text() != make()
    ]
    if "--check" in sys.argv:
        for name in stale:
            sys.stderr.write(f"docs/{name} is out of date: make docs\n")
        for link in unlinked():
            sys.stderr.write(f"{link} is missing: make docs\n")
        return bool(stale or unlinked())
    for link, page in unlinked().items():
        link.symlink_to(Path("..", "..", "docs", "models", page.name))
    for name in stale:
        (HERE / name).write_text(PAGES[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
