"""`detr zoo pull|verify|convert|path|rm`: the weights of the zoo on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrcli.cli import console
from detrcli.cli.complete import model_names
from detrcli.cli.options import AsJson, Yes

if TYPE_CHECKING:
    from detrcli.weights.convert import Converted
    from detrcli.weights.hub import Reference
    from detrcli.weights.resolve import Choice

Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|OWNER/REPO",
        help="A model for its declared weights, or a Hub reference: owner/repo, @revision and :file as needed.",
        autocompletion=model_names,
    ),
]


def pull(
    name: Name,
    offline: Annotated[bool, typer.Option("--offline", help="Only look into the cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch weights from the Hub, pinned and hashed; what is here already costs no request."""
    console.settings.json = as_json
    from detrcli.weights.hub import fetch

    fetched = fetch(reference_of(name), offline=offline)
    if as_json:
        facts = {
            "repo": fetched.repo,
            "revision": fetched.commit,
            "file": fetched.file,
            "sha256": fetched.sha256,
        }
        console.emit_json(facts | {"path": str(fetched.path), "first_use": fetched.first_use})
        return
    console.note(str(fetched))
    console.say(str(fetched.path))


def path(name: Name, as_json: AsJson = False) -> None:
    """Print where the weights of a model lie, those that the other commands would take; downloads nothing."""
    console.settings.json = as_json
    from detrcli.errors import HubError
    from detrcli.weights import hub

    choice = _choice(name)
    place: Path | None
    if isinstance(choice, Path):
        place = choice
    else:
        names = (choice.file,) if choice.file else hub.USUAL_FILES
        place = next((p for n in names if (p := hub.cached(choice, n))), None)
    if place is None:
        raise HubError(f"{choice} is not on this machine", hint=f"detr zoo pull {name}")
    if as_json:
        console.emit_json({"path": str(place)})
    else:
        console.say(str(place))


def rm(
    name: Name,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete what the Hub cache holds of a repository, and what was recorded of it. Training runs are never touched."""
    console.settings.json = as_json
    from detrcli.errors import UsageError
    from detrcli.weights import hub

    repo = reference_of(name).repo
    size = hub.size_of(repo)
    question = f"delete {repo} from the Hub cache ({size / 1e6:.1f} MB)?"
    if not yes and not (sys.stdin.isatty() and typer.confirm(question, err=True)):
        raise UsageError("nothing was deleted", hint="--yes deletes without asking")
    gone = hub.forget(repo)
    if as_json:
        console.emit_json({"repo": repo, "bytes": size, "deleted": [str(folder) for folder in gone]})
    else:
        console.note(f"deleted {repo} ({size / 1e6:.1f} MB)" if gone else f"nothing of {repo} is here")


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL|FILE]…", help="Without any: all weights on this machine."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hash weights again, load them whole and compare the model's answers with its stored fingerprint."""
    console.settings.json = as_json
    from detrcli.errors import DetrError, VerificationError
    from detrcli.weights.verify import verify as check

    choices = [_choose(name) for name in names] if names else _all_here()
    if not choices:
        raise VerificationError("there are no weights on this machine to verify", hint="detr zoo pull MODEL")
    rows: list[dict[str, Any]] = []
    for choice in choices:
        try:
            found = check(choice)
        except (DetrError, OSError) as error:
            why = (
                error.message
                if isinstance(error, DetrError)
                else f"cannot read it: {error.strerror or error}"
            )
            facts = {"model": choice.model.name, "weights": str(choice.source)}
            rows.append(facts | {"ok": False, "error": why})
            continue
        facts = {"hash": found.hash_from, "fingerprint": found.fingerprint_from, "sha256": found.sha256}
        rows.append({"model": found.model, "weights": str(found.path), "ok": True, "error": None} | facts)
    _show_verified(rows, as_json)
    failed = [row for row in rows if not row["ok"]]
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(rows)} weights failed: {failed[0]['error']}",
            hint="detr zoo pull fetches anew",
        )


def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: .pth, .bin, .safetensors or a shard index.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The model it was trained as, such as detr/r50.", autocompletion=model_names
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The new file; beside the old one if not given.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Write a file of ours in this layout: official, hub, …")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn an official or Hub checkpoint into one file of ours, or one of ours back (--to)."""
    console.settings.json = as_json
    from detrcli.errors import UsageError
    from detrcli.weights import convert as converting

    if to is not None and model is not None:
        raise UsageError("--to takes the model from the file", hint="leave --model out")
    suffix = ".safetensors" if to is None else ".pth" if to == "official" else f".{to}.safetensors"
    stem = source.name.partition(".")[0]
    target = out or source.with_name(stem + suffix)
    if out is None and target == source:
        target = source.with_name(f"{stem}.detrcli{suffix}")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{target} is the file to convert", hint="choose another --out")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists", hint="choose another --out, or --overwrite")
    done = converting.to_layout(source, target, to) if to else converting.to_native(source, target, model)
    _show_converted(done, as_json)


def reference_of(name: str) -> Reference:
    """The declared weights of a model, or the Hub reference that the name is."""
    from detrcli.errors import ModelError, UsageError
    from detrcli.plugins import models, resolve
    from detrcli.plugins.registry import fold
    from detrcli.weights.hub import Reference

    try:
        model = resolve(name)
    except UsageError:
        family = name.partition("/")[0]
        if "/" not in name or any(fold(m.family.name) == fold(family) for m in models()):
            raise
        return Reference.parse(name)
    for weights in model.variant.weights:
        return Reference.declared(weights)
    raise ModelError(
        f"{model.name} declares no weights: nobody has published any that we know",
        hint=f"train it (detr train DATA --model {model.name}) or convert a checkpoint (detr zoo convert FILE)",
    )


def _choice(name: str) -> Path | Reference:
    """What the other commands would take for this name."""
    from detrcli.errors import UsageError
    from detrcli.plugins import resolve
    from detrcli.weights.resolve import choose

    try:
        resolve(name)
    except UsageError:
        return reference_of(name)
    return choose(name).source


def _choose(name: str) -> Choice:
    """A model's weights, else those of a file or a run."""
    from detrcli import runs
    from detrcli.errors import UsageError
    from detrcli.plugins import resolve
    from detrcli.weights.resolve import choose

    try:
        resolve(name)
    except UsageError:
        if Path(name).exists() or (runs.root("train") / name).is_dir():
            return choose(None, name)
        raise
    return choose(name)


def _all_here() -> list[Choice]:
    """Every model whose weights are on this machine, without a family's doubles."""
    from detrcli.plugins import models
    from detrcli.weights.resolve import choose, finished_runs
    from detrcli.weights.status import status

    runs = finished_runs()
    return [choose(m.name) for m in models() if status(m, runs).kind in ("trained", "cached")]


def _show_verified(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        if all(row["ok"] for row in rows):
            console.emit_json({"verified": rows})
        return
    columns = ("model", "weights", "hash compared with", "answers compared with", "result")
    console.table(
        columns,
        [
            [
                r["model"],
                r["weights"],
                r.get("hash", ""),
                r.get("fingerprint", ""),
                "ok" if r["ok"] else r["error"],
            ]
            for r in rows
        ],
    )


def _show_converted(done: Converted, as_json: bool) -> None:
    report = done.report
    if as_json:
        facts = {"path": str(done.path), "model": done.model, "num_classes": done.num_classes}
        lists = {"kept": len(report.kept), "dropped": list(report.dropped), "filled": list(report.filled)}
        console.emit_json(facts | {"layout": report.layout} | lists)
        return
    console.note(
        f"{done.model}, {done.num_classes} classes: {len(report.kept)} tensors (layout {report.layout}), "
        f"{len(report.dropped)} left out, {len(report.filled)} filled from a shared one"
    )
    for name in report.dropped:
        console.detail(f"left out: {name}")
    console.say(str(done.path))
