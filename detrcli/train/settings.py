"""The settings of a run as a TOML file, which `detr train --config FILE` runs again; hand-written ones too.

    data = "shapes"                  the names of the flags, with _ for -
    model = "deformable_detr/tiny"
    epochs = 12
    seed = 1

    [set.recipe]                     what --set reaches
    lr = 2e-4
    [set.model]
    num_queries = 50

Flags win over the file. What is not known, or of a wrong type, is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from detrcli import toml
from detrcli.config import assign, from_plain, to_plain
from detrcli.errors import UsageError, unknown
from detrcli.plugins import resolve
from detrcli.train.plan import OF_RECIPE, Plan, Request, agree, choose_recipe

T = TypeVar("T")
_HEAD = "# Every setting of this run. Again, to the same numbers: detr train --config {file}\n"
_CHANGED = "# Every setting of this run as it goes on. It began with others: no run with --config {file} gives its numbers.\n"


def write(file: Path, plan: Plan, *, as_begun: bool) -> str:
    """The text of a file that means this plan, which the run has had from its beginning or not."""
    return (_HEAD if as_begun else _CHANGED).format(file=file.name) + toml.dumps(as_table(plan))


def is_as_begun(file: Path) -> bool:
    """Whether the run that a file is of has had its settings from the beginning."""
    return file.read_text(encoding="utf-8").startswith(_HEAD.format(file=file.name))


def as_table(plan: Plan) -> dict[str, Any]:
    """The plan in the words of a request; the recipe whole, so that none needs to be chosen."""
    whole = to_plain(plan)
    kept = {f.name for f in fields(Request)} & whole.keys()
    table = {name: value for name, value in whole.items() if name in kept}
    return table | {"set": {"model": whole["config"], "recipe": whole["recipe"]}}


def plan(file: Path) -> Plan:
    """The plan that `write` wrote, as it was: what this machine would choose, and what flags say, plays no part."""
    table = toml.read(file)
    whole = table.pop("set", {})
    if not isinstance(whole, dict) or not {"model", "recipe"} <= whole.keys():
        raise UsageError(f"{file} does not hold every setting of a run", hint="it runs again with --config")
    return _located(
        file, lambda: Plan.from_plain({**table, "config": whole["model"], "recipe": whole["recipe"]})
    )


def read(file: Path) -> Request:
    """What a file asks for, checked; `data` and `model` are empty where it does not say."""
    table = toml.read(file)
    _known(file, table)
    changes = _changes(file, table.pop("set", {}))
    request = _located(file, lambda: from_plain(Request, {"data": "", "model": "", **table}))
    request = replace(request, changes=changes)
    if request.model:
        _check(file, request)
    return request


def over(file: Request, flags: Mapping[str, Any]) -> Request:
    """The flags over the file."""
    model = flags.get("model", file.model)
    if file.changes and file.model and resolve(model).name != resolve(file.model).name:
        raise UsageError(
            f"the file's [set] is for {file.model}, not for {model}",
            hint="leave --model out, or take a copy of the file without [set]",
        )
    return replace(from_plain(Request, {**_given(file), **flags}), under=file)


def _given(file: Request) -> dict[str, Any]:
    """What the file says beyond the recipe, which has its own order: file, flags, --set."""
    said = {f.name: getattr(file, f.name) for f in fields(Request)}
    return {name: value for name, value in said.items() if name not in (*OF_RECIPE, "changes", "under")}


def _known(file: Path, table: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(Request) if f.name not in ("changes", "under")]
    for key in table:
        if key not in (*names, "set"):
            raise _at(file, unknown("setting", key, (*names, "set.model", "set.recipe")))


def _changes(file: Path, table: Any) -> dict[str, Any]:
    """`[set.model]` and `[set.recipe]` as the paths of --set."""
    if not isinstance(table, dict):
        raise _at(file, UsageError("set needs a table", hint="write [set.recipe] or [set.model]"))
    changes: dict[str, Any] = {}
    for part, values in table.items():
        if part not in ("model", "recipe") or not isinstance(values, dict):
            raise _at(file, unknown("setting", f"set.{part}", ("set.model", "set.recipe")))
        changes |= {f"{part}.{name}": value for name, value in values.items()}
    return changes


def _check(file: Path, request: Request) -> None:
    """What the file sets must fit its model."""
    variant = _located(file, lambda: resolve(request.model or "")).variant
    parts: dict[str, dict[str, Any]] = {"model": {}, "recipe": {}}
    for path, value in (request.changes or {}).items():
        part, _, name = path.partition(".")
        parts[part][name] = value
    recipe = choose_recipe(variant.recipes, request.epochs)
    _located(file, lambda: assign(variant.config, parts["model"], "model."))
    _located(file, lambda: assign(recipe, parts["recipe"], "recipe."))
    _located(file, lambda: agree(request))


def _located(file: Path, read: Callable[[], T]) -> T:
    """What `read` returns; its complaint with the line of the setting that it names."""
    try:
        return read()
    except UsageError as error:
        raise _at(file, error) from error


def _at(file: Path, error: UsageError) -> UsageError:
    line = next((line for line, path in reversed(toml.keys(file)) if _names(error.message, path)), None)
    hint = error.hint and error.hint.replace("--set ", "")
    return UsageError(f"{file}{f':{line}' if line else ''}: {error.message}", hint=hint)


def _names(message: str, path: tuple[str, ...]) -> bool:
    """Whether an error is about a key of the file: it has the key's dotted path, or that of a table around it, in it."""
    dotted = ".".join(path[1:] if path[:1] == ("set",) and len(path) > 2 else path)
    return bool(path) and re.search(rf"(?<![\w.]){re.escape(dotted)}(?![\w])", message) is not None
