"""Finding plugins in two phases: metadata first, import second, so that one broken plugin never hides the others.

    find()   Found(name, entry point)                               nothing imported
    load()   Loaded(found, plugin) or Broken(found, reason)         each plugin on its own

`DETR_PLUGINS=detr,my_paper` restricts what is loaded (empty: nothing), for tests and bug reports.
"""

from __future__ import annotations

import functools
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from detrcli.config import assign, settings
from detrcli.errors import DetrError, PluginError, UsageError, unknown
from detrcli.plugins.contract import (
    API,
    Family,
    Paper,
    Plugin,
    Preprocess,
    Published,
    Recipe,
    Variant,
    Weights,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output

GROUP = "detrcli.models"


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin that is installed; not imported yet."""

    name: str
    entry_point: EntryPoint

    @property
    def distribution(self) -> str:
        return self.entry_point.dist.name if self.entry_point.dist else "?"

    @property
    def version(self) -> str:
        return self.entry_point.dist.version if self.entry_point.dist else "?"

    @property
    def own(self) -> bool:
        """Whether it comes with detrcli itself."""
        return self.distribution == "detrcli"


@dataclass(frozen=True, slots=True)
class Loaded:
    found: Found
    plugin: Plugin


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that cannot be used, and why; shown in lists, fatal only for who asks for it."""

    found: Found
    reason: str
    trace: str = ""
    families: tuple[str, ...] = ()  # the names it would have given, as far as they are known


@dataclass(frozen=True, slots=True)
class Model:
    """A variant with the family and paper it belongs to: what a name such as `detr/r50` means."""

    paper: Paper
    family: Family[Any]
    variant: Variant[Any]
    found: Found

    @property
    def name(self) -> str:
        return f"{self.family.name}/{self.variant.name}"

    @property
    def config(self) -> Any:
        return self.variant.config

    def configured(self, config: Any) -> Model:
        """The same model with another configuration."""
        return replace(self, variant=replace(self.variant, config=config))

    @property
    def page(self) -> str | None:
        """The family's page, which its package carries: FAMILY.md."""
        path = files(self.found.entry_point.module.partition(".")[0]) / f"{self.family.name}.md"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def build(self, num_classes: int | None = None) -> nn.Module:
        """An untrained network; by default with as many classes as the variant was published with."""
        with self._named():
            return self.family.build_model(self.config, num_classes or self.variant.num_classes)

    def criterion(self, num_classes: int) -> Criterion:
        """The loss of the family, for so many classes."""
        with self._named():
            return self.family.build_criterion(self.config, num_classes)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the plugin where one that is not ours fails in its own way."""
        try:
            yield
        except DetrError:
            raise
        except Exception as error:
            if self.found.own:
                raise
            who = f"{self.family.name} of {self.found.distribution} {self.found.version}"
            raise PluginError(
                f"{who} failed: {type(error).__name__}: {error}",
                hint=f"report it to {self.found.distribution} with the output of the same command after DETR_DEBUG=1",
            ) from error

    def postprocess(self, output: Output, sizes: Tensor) -> list[Detections]:
        """Detections in the pixels of pictures of the given sizes, (B, 2) height and width."""
        return self.family.postprocess(self.config, output, sizes)


def find() -> list[Found]:
    """Every installed plugin, sorted; metadata only."""
    found = [Found(ep.name, ep) for ep in entry_points(group=GROUP)]
    chosen = os.environ.get("DETR_PLUGINS")
    if chosen is not None:
        names = {name.strip() for name in chosen.split(",")}
        found = [f for f in found if f.name in names]
    return sorted(found, key=lambda f: (f.name, f.entry_point.value))


def load(found: Found) -> Loaded | Broken:
    """Import one plugin; whatever goes wrong in it is its own."""
    try:
        plugin = found.entry_point.load()
    except (
        Exception,
        SystemExit,
    ) as error:  # third-party code may fail in any way; it is reported, not hidden
        return Broken(found, f"{type(error).__name__}: {error}", traceback.format_exc())
    if not isinstance(plugin, Plugin):
        return Broken(
            found, f"{found.entry_point.value} is a {type(plugin).__name__}, not a detrcli.plugins.Plugin"
        )
    if plugin.api != API:
        older = "upgrade the plugin" if plugin.api < API else "upgrade detrcli"
        return Broken(found, f"plugin speaks api {plugin.api}, this detrcli speaks {API}: {older}")
    names: tuple[str, ...] = ()
    try:
        names = tuple(str(family.name) for family in plugin.families)
        fault = _fault(plugin)
    except Exception as error:  # fields of other kinds than the contract's
        fault = f"its declaration cannot be read: {type(error).__name__}: {error}"
    return Broken(found, fault, families=names) if fault else Loaded(found, plugin)


def _fault(plugin: Plugin) -> str | None:
    """What would make a family impossible to name or to list, in words; the conformance kit asks for more."""
    for family in plugin.families:
        names = [variant.name for variant in family.variants]
        for name in (family.name, *names):
            if not re.fullmatch(r"[\w.-]+", name):
                return f"{name!r} cannot be typed as the name of a model: use letters, digits, - and _"
        if not names or len(set(map(fold, names))) < len(names):
            return f"family {family.name!r} needs variants, each with a name of its own; it has {names}"
        faults = (_faulty(variant) for variant in family.variants)
        if fault := _wrong(family.summary, str, "summary") or next(filter(None, faults), None):
            return f"family {family.name!r}: {fault}"
    return _wrong(plugin.paper, Paper, "paper")


def _faulty(variant: Variant[Any]) -> str | None:
    """The first part of a variant that is not what the contract says, in words."""
    if not is_dataclass(variant.config) or isinstance(variant.config, type):
        return f"{variant.name}.config is no instance of a dataclass"
    if not variant.recipes:
        return f"{variant.name} needs a recipe at least"
    faults = (_wrong(value, kind, f"{variant.name}.{where}") for where, value, kind in _parts(variant))
    return next(filter(None, faults), None)


def _parts(variant: Variant[Any]) -> Iterator[tuple[str, object, type]]:
    """The parts of a variant with the kind that the contract says; lazily, so that a tuple is one before it is iterated."""
    yield "params", variant.params, int
    yield "num_classes", variant.num_classes, int
    yield "summary", variant.summary, str
    yield "preprocess", variant.preprocess, Preprocess
    if variant.published is not None:
        yield "published", variant.published, Published
    for name, kind in (("recipes", Recipe), ("weights", Weights)):
        items = getattr(variant, name)
        yield name, items, tuple
        yield from ((f"{name}[{i}]", item, kind) for i, item in enumerate(items))


def _wrong(value: object, kind: type, where: str) -> str | None:
    """How a part of a declaration differs from the contract, itself or in one of its fields."""
    if not isinstance(value, kind):
        wanted = {int: "whole number", str: "text"}.get(kind, kind.__name__)
        return f"{where} is a {type(value).__name__}, not a {wanted}"
    if is_dataclass(value):
        try:
            assign(value, settings(value), f"{where}.")
        except UsageError as error:
            return error.message
    return None


@functools.cache
def plugins() -> tuple[Loaded | Broken, ...]:
    """All plugins. A family name declared twice makes none of them the owner: they are broken, and say so; only what comes
    with detrcli itself keeps its names."""
    states = [load(found) for found in find()]
    owners: dict[str, list[Loaded]] = {}
    for state in states:
        if isinstance(state, Loaded):
            for family in state.plugin.families:
                owners.setdefault(fold(family.name), []).append(state)
    return tuple(_refuse_duplicates(state, owners) for state in states)


def _refuse_duplicates(state: Loaded | Broken, owners: dict[str, list[Loaded]]) -> Loaded | Broken:
    if isinstance(state, Broken):
        return state
    for family in state.plugin.families:
        rivals = owners[fold(family.name)]
        ours = [rival for rival in rivals if rival.found.own]
        if len(rivals) > 1 and ours != [state]:
            who = " and ".join(f"{r.found.distribution} ({r.found.entry_point.value})" for r in rivals)
            whom = state.found.distribution if ours else "one"
            reason = f"family {family.name!r} is declared twice, by {who}: uninstall {whom}"
            return Broken(state.found, reason, families=tuple(f.name for f in state.plugin.families))
    return state


def fold(name: str) -> str:
    """Names compare without case, and `-` and `_` are one."""
    return name.strip().lower().replace("-", "_")


def models() -> list[Model]:
    """Every usable variant of every family, in declaration order."""
    return [
        Model(state.plugin.paper, family, variant, state.found)
        for state in plugins()
        if isinstance(state, Loaded)
        for family in state.plugin.families
        for variant in family.variants
    ]


def broken() -> list[Broken]:
    return [state for state in plugins() if isinstance(state, Broken)]


def resolve(name: str) -> Model:
    """The model that `FAMILY[/VARIANT]` names, or an error with the nearest names."""
    family_name, _, variant_name = name.partition("/")
    known = models()
    family = [m for m in known if fold(m.family.name) == fold(family_name)]
    if not family:
        explain_broken(family_name)
        names = list(dict.fromkeys(m.family.name for m in known))
        raise unknown(
            "model", name, [*names, *(m.name for m in known)] if "/" in name else names, see="detr zoo list"
        )
    if not variant_name:
        return family[0]
    for model in family:
        if fold(model.variant.name) == fold(variant_name):
            return model
    raise unknown(f"variant of {family[0].family.name}:", variant_name, (m.variant.name for m in family))


def explain_broken(family_name: str) -> None:
    """An error where a broken plugin has this name, or would have given a family of this name."""
    for state in broken():
        if fold(family_name) in map(fold, (state.found.name, *state.families)):
            raise PluginError(
                f"plugin {state.found.name!r} of {state.found.distribution} {state.found.version} does not load: {state.reason}",
                hint=f"reinstall or upgrade {state.found.distribution}, or leave it out with DETR_PLUGINS; DETR_DEBUG=1 shows more",
            )
