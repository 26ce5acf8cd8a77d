"""Writes the pages that come from the program: the command reference and the table of models; links papers' pages into them.

python docs/generate.py            rewrite them
python docs/generate.py --check    exit 1 when one is out of date
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from typer.cli import get_docs_for_click
from typer.core import TyperGroup
from typer.main import get_command

from detrcli.cli.app import app
from detrcli.plugins import Model, models, resolve
from detrcli.profile.plot import draw, points
from detrcli.profile.published import against_published, as_its_paper
from detrcli.profile.run import Profile

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
        "*Published* are the papers' or their repositories' numbers, on COCO val2017, with their source. *Counted* are parameters and",
        "multiply-adds of the model as it is built here, the latter as the paper counted (`detr profile --compare-published`),",
        "with the difference in per cent. Nothing here was measured on COCO by this project.",
        "",
        "![published AP over counted GFLOPs](images/tradeoff.svg)",
        "",
    ]
    papers: dict[str, list[Model]] = {}
    for model in models():
        papers.setdefault(f"{model.paper.title} ({model.paper.venue} {model.paper.year})", []).append(model)
    for title, rows in papers.items():
        lines += [f"## {title}", "", f"<{rows[0].paper.url}>", "", *_table(rows), ""]
    return NOTE + "\n".join(lines)


def _table(rows: list[Model]) -> list[str]:
    head = [
        "model",
        "AP",
        "GFLOPs: published",
        "counted",
        "parameters: published",
        "counted",
        "source",
        "weights",
    ]
    body = [[_link(m), *_numbers(m), _weights(m)] for m in rows]
    table = [_row(head), _row(["---", *["---:"] * 5, "---", "---"]), *map(_row, body)]
    return [*table, *(["", *notes] if (notes := list(_reasons(rows))) else [])]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _link(model: Model) -> str:
    page = HERE / "models" / f"{model.family.name}.md"
    return f"[`{model.name}`](models/{page.name})" if page.exists() else f"`{model.name}`"


def _numbers(model: Model) -> list[str]:
    """AP, both kinds of GFLOPs, both kinds of parameters, and where the published ones stand."""
    published, found = model.variant.published, profiled(model.name)
    if published is None:
        return ["", "", f"{found.macs / 1e9:.1f}", "", f"{found.params:,}", ""]
    percent = {d.what: f" ({d.percent:+.1f} %)" for d in against_published(found)}
    return [
        f"{published.ap:g}" if published.ap else "",
        f"{published.gflops:g}" if published.gflops else "",
        f"{found.macs / 1e9:.1f}{percent.get('GFLOPs', '')}",
        f"{published.params_m:g} M" if published.params_m else "",
        f"{found.params:,}{percent.get('parameters (M)', '')}",
        published.source,
    ]


def _reasons(rows: list[Model]) -> Iterator[str]:
    """Why numbers are more than 2 % apart. A missing reason stops the page, and so does one that nothing needs."""
    for model in rows:
        far = [d for d in against_published(profiled(model.name)) if not d.close]
        why = model.variant.published.difference if model.variant.published else ""
        if bool(far) != bool(why):
            raise SystemExit(
                f"{model.name}: differs in {[d.what for d in far]}, the declaration says {why!r}"
            )
        if why:
            yield f"- `{model.name}`: {why}."


@cache
def profiled(name: str) -> Profile:
    return as_its_paper(resolve(name)).profile()


def _weights(model: Model) -> str:
    return ", ".join(f"{w.repo} ({w.license})" for w in model.variant.weights)


def tradeoff() -> str:
    """The picture of the README: AP as published over GFLOPs as counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tradeoff.svg")
        draw(points([profiled(m.name) for m in models()]), path)
        return path.read_text()


PAGES = {"cli.md": commands, "zoo.md": zoo, "images/tradeoff.svg": tradeoff}


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
