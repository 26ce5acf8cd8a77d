"""`detr zoo`: the models there are, their papers, numbers and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrcli.cli import console
from detrcli.cli.complete import model_names
from detrcli.cli.lazy import group
from detrcli.cli.options import AsJson

if TYPE_CHECKING:
    from detrcli.plugins.contract import Published, Weights
    from detrcli.plugins.registry import Model
    from detrcli.weights.resolve import Run

WEIGHTS = "detrcli.cli.zoo_weights"
app = group(
    {
        "list": (f"{__name__}:list_models", "Every model: paper, parameters, published AP, weights."),
        "info": (f"{__name__}:info", "A paper with its page, or one variant with its numbers."),
        "search": (f"{__name__}:search", "Find models of the zoo, or repositories on the Hub."),
        "pull": (f"{WEIGHTS}:pull", "Fetch weights from the Hub, pinned and hashed."),
        "verify": (f"{WEIGHTS}:verify", "Hash weights again and compare the model's answers."),
        "convert": (f"{WEIGHTS}:convert", "Official or Hub checkpoints to ours, and back."),
        "path": (f"{WEIGHTS}:path", "Where the weights of a model lie."),
        "rm": (f"{WEIGHTS}:rm", "Delete what the Hub cache holds of a repository."),
        "new": (f"{__name__}:new", "Write a plugin package for a paper."),
    },
    help="Models, papers and weights.",
)


def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Only these: a family or a shell pattern.", autocompletion=model_names)
    ] = "*",
    ready: Annotated[
        bool, typer.Option("--ready", help="Only models whose weights are on this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List every model with its paper, counted parameters, published AP and the state of its weights."""
    console.settings.json = as_json
    from detrcli.errors import unknown
    from detrcli.models import list_models as names_like
    from detrcli.plugins import broken, models
    from detrcli.plugins.registry import explain_broken
    from detrcli.weights.resolve import finished_runs

    names = names_like(pattern)
    if not names and pattern != "*":
        explain_broken(pattern.partition("/")[0])
        known = list(dict.fromkeys(m.family.name for m in models()))
        raise unknown("model", pattern, known, see="detr zoo list")
    runs = finished_runs()
    rows = [row(m, runs) for m in models() if m.name in names]
    if ready:
        rows = [r for r in rows if r["weights"]["state"] in ("trained", "cached")]
    faults = [
        {"plugin": b.found.name, "distribution": b.found.distribution, "reason": b.reason} for b in broken()
    ]
    if as_json:
        console.emit_json({"models": rows, "broken": faults})
        return
    _draw(rows)
    for fault in faults:
        console.note(f"broken plugin {fault['plugin']} ({fault['distribution']}): {fault['reason']}")


def info(
    name: Annotated[
        str, typer.Argument(metavar="MODEL", help="FAMILY or FAMILY/VARIANT.", autocompletion=model_names)
    ],
    as_json: AsJson = False,
) -> None:
    """Show a paper with its page, or one variant with its numbers, recipes, configuration and weights."""
    console.settings.json = as_json
    from detrcli.plugins import models, resolve

    model = resolve(name)
    variants = [model] if "/" in name else [m for m in models() if m.family.name == model.family.name]
    if as_json:
        console.emit_json({"paper": _paper(model), "models": [row(m, whole=True) for m in variants]})
        return
    if "/" in name:
        _show_variant(model)
    else:
        _show_family(variants)


def search(
    words: Annotated[list[str], typer.Argument(help="Parts of names, titles, authors, venues or summaries.")],
    hub: Annotated[
        bool, typer.Option("--hub", help="Ask the Hugging Face Hub for repositories instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find models of the zoo, or detection repositories on the Hub."""
    console.settings.json = as_json
    if hub:
        from detrcli.weights.hub import search as ask

        found = ask(" ".join(words))
        if as_json:
            console.emit_json({"repositories": found})
        else:
            console.table(
                ("repository", "licence", "downloads", "changed"), [list(map(str, r.values())) for r in found]
            )
        return
    from detrcli.plugins import models

    rows = [row(m) for m in models() if _about(m, words)]
    if as_json:
        console.emit_json({"models": rows})
    elif rows:
        _draw(rows)
    else:
        console.note(f"no model of the zoo speaks of {' '.join(words)}; --hub asks the Hub")


def _about(model: Model, words: list[str]) -> bool:
    paper, variant = model.paper, model.variant
    facts = (
        model.name,
        paper.title,
        paper.authors,
        paper.venue,
        str(paper.year),
        model.family.summary,
        variant.summary,
    )
    text = " ".join(facts).lower()
    return all(word.lower() in text for word in words)


def new(
    name: Annotated[str, typer.Argument(help="The name users will type, such as sparse-detr.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder; NAME here if not given.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The paper's title.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a plugin package for a paper: it installs, trains and passes the conformance kit as it is."""
    console.settings.json = as_json
    from detrcli.errors import typed
    from detrcli.plugins.scaffold import scaffold

    folder = out or Path(name)
    family, written = scaffold(name, folder, title)
    if as_json:
        console.emit_json({"family": family, "folder": str(folder), "files": [str(path) for path in written]})
        return
    for path in written:
        console.say(str(path))
    commands = (
        typed("pip", "install", "-e", folder),
        typed("detr", "train", "shapes", "--model", f"{family}/tiny"),
        typed("pytest", folder),
    )
    console.note(f"next: {' && '.join(commands)}")


def row(model: Model, runs: Sequence[Run] | None = None, *, whole: bool = False) -> dict[str, Any]:
    """One variant as plain values; `whole` adds recipes and configuration."""
    from detrcli.config import to_plain
    from detrcli.weights.status import status

    variant, state = model.variant, status(model, runs)
    found: dict[str, Any] = {
        "name": model.name,
        "paper": _paper(model),
        "params": variant.params,
        "num_classes": variant.num_classes,
        "published": to_plain(variant.published),
        "weights": {
            "state": state.kind,
            "path": str(state.path) if state.path else None,
            "bytes": state.size,
            "declared": to_plain(variant.weights),
        },
        "summary": variant.summary,
        "plugin": {"distribution": model.found.distribution, "version": model.found.version},
    }
    if whole:
        found |= {
            "config": to_plain(variant.config),
            "recipes": to_plain(variant.recipes),
            "preprocess": to_plain(variant.preprocess),
        }
    return found


def _paper(model: Model) -> dict[str, Any]:
    from detrcli.config import to_plain

    paper: dict[str, Any] = to_plain(model.paper)
    return paper


def _draw(rows: list[dict[str, Any]]) -> None:
    columns = ("model", "paper", "params", "AP", "GFLOPs", "AP from", "weights")
    console.table(columns, [_cells(r) for r in rows], right=("params", "AP", "GFLOPs"))


def _cells(found: dict[str, Any]) -> list[str]:
    paper, published = found["paper"], found["published"] or {}
    return [
        found["name"],
        f"{paper['venue']} {paper['year']}",
        millions(found["params"]),
        _number(published.get("ap")),
        _number(published.get("gflops")),
        published.get("source", ""),
        found["weights"]["state"],
    ]


def millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _show_family(variants: list[Model]) -> None:
    first = variants[0]
    paper = first.paper
    console.say(f"{paper.title} ({paper.authors + ', ' if paper.authors else ''}{paper.venue} {paper.year})")
    for link in (paper.url, paper.code):
        if link:
            console.say(link)
    console.say(f"\n{first.family.name}: {first.family.summary}")
    _draw([row(m) for m in variants])
    if first.page:
        console.markdown(first.page)


def _show_variant(model: Model) -> None:
    from detrcli.config import settings

    variant = model.variant
    console.say(f"{model.name}  {variant.summary}".rstrip())
    console.say(f"paper       {model.paper.title}, {model.paper.venue} {model.paper.year}, {model.paper.url}")
    console.say(f"parameters  {variant.params:,} (counted, {variant.num_classes} classes)")
    console.say(f"published   {_published(variant.published)}")
    for weights in variant.weights:
        console.say(f"weights     {describe(weights)}")
    console.say(f"on disk     {_on_disk(model)}")
    for recipe in variant.recipes:
        console.say(
            f"recipe      {recipe.epochs} epochs, batch {recipe.batch_size}, lr {recipe.lr:g} ({recipe.source})"
        )
    for path, value in settings(variant.config).items():
        console.say(f"  {path} = {value}")


def _published(published: Published | None) -> str:
    from detrcli.config import to_plain

    if published is None:
        return "nothing"
    facts = to_plain(published)
    numbers = [f"{key} {value:g}" for key, value in facts.items() if isinstance(value, (int, float))]
    counted = f"; {published.difference}" if published.difference else ""
    return f"{', '.join(numbers)} ({published.source}){counted}"


def describe(weights: Weights) -> str:
    """Source, licence and how sure we are of it, in one line."""
    from detrcli.weights.hub import Reference
    from detrcli.weights.status import pinned

    return f"{Reference.declared(weights)}, {weights.license}, trained on {weights.trained_on}; {pinned(weights)}"


def _on_disk(model: Model) -> str:
    from detrcli.weights.status import status

    state = status(model)
    return f"{state.kind}: {state.path} ({(state.size or 0) / 1e6:.1f} MB)" if state.path else "nothing yet"
