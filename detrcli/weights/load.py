"""Putting a weights file into a model: recognise its layout, map its names, say in one message what does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detrcli.config import settings
from detrcli.data.classes import labels_in
from detrcli.data.coco_classes import coco_of
from detrcli.errors import CheckpointError
from detrcli.plugins.contract import Family, Variant
from detrcli.plugins.registry import Model
from detrcli.types import Categories
from detrcli.weights import file, keymap
from detrcli.weights.hub import Reference, companion, fetch
from detrcli.weights.keymap import KeyMap, Mapped
from detrcli.weights.labels import CONFIG, beside, named_in
from detrcli.weights.metadata import Metadata
from detrcli.weights.resolve import Choice, choose

NATIVE = "native"
SHOWN = 6  # names of each list in a message


@dataclass(frozen=True, slots=True)
class Reshaped:
    """A tensor whose shape in the file is not the model's."""

    name: str
    file: tuple[int, ...]
    model: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {list(self.file)} (model: {list(self.model)})"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every tensor: of the file, by our names where a map knows them, and of the model."""

    layout: str
    kept: tuple[str, ...]
    missing: tuple[str, ...] = ()  # the model has them, the file does not
    unexpected: tuple[str, ...] = ()  # names of the file that the model does not have
    reshaped: tuple[Reshaped, ...] = ()
    dropped: tuple[str, ...] = ()  # names of the file that its layout says to leave out
    filled: tuple[str, ...] = ()  # copies of a tensor that the file holds once
    remade: tuple[str, ...] = ()  # rows of classes, made anew
    copied_classes: tuple[str, ...] = ()  # classes whose rows were taken over, by name

    @property
    def only_rows(self) -> bool:
        """All tensors of other shape differ by one number of rows: the file has more or fewer classes."""
        return all(_only_rows(r) for r in self.reshaped) and len(_more_rows(self.reshaped)) <= 1

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    def __str__(self) -> str:
        lists = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of other shape", self.reshaped),
        )
        return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in lists if names)


def load_weights(
    module: nn.Module,
    source: str | Path | Choice,
    model: Model,
    *,
    classes: Categories | None = None,
    offline: bool = False,
) -> LoadReport:
    """Fill a model with a weights file, a run or a Hub reference, in any layout its family knows.

    With `classes` (those of the model) the file may have others: rows of the class heads are taken over by name.
    """
    if not isinstance(source, Choice):
        source = choose(model.name, str(source))
    tensors, metadata = read(source, offline=offline)
    check_untold(metadata, model, str(source.source))
    pair = pair_of(source, tensors, metadata, module, model, classes, offline=offline)
    return load_state(
        module, tensors, model.family, model.variant.config, classes=pair, source=str(source.source)
    )


def read(choice: Choice, *, offline: bool = False) -> tuple[dict[str, Tensor], Metadata | None]:
    """The tensors and the description of chosen weights, fetched first if they are on the Hub."""
    path = choice.source if isinstance(choice.source, Path) else fetch(choice.source, offline=offline).path
    return file.load(path)


def pair_of(
    choice: Choice,
    tensors: Mapping[str, Tensor],
    said: Metadata | None,
    module: nn.Module,
    model: Model,
    classes: Categories | None,
    *,
    offline: bool = False,
) -> tuple[Categories | None, Categories] | None:
    """The classes of weights that were read and those of the module, where rows may go over by name."""
    if classes is None:
        return None
    if said is not None:
        return said.categories, classes
    count = count_classes(tensors, model.family, model.config, len(classes), module)
    return classes_of_others(choice.source, count, offline=offline), classes


def classes_of_others(source: Path | Reference, count: int, *, offline: bool = False) -> Categories | None:
    """The classes of weights that do not say: those that the configuration beside them names, if they are so many; COCO's where
    their number says so."""
    config = beside(source) if isinstance(source, Path) else companion(source, CONFIG, offline=offline)
    return (named_in(config, count) if config else None) or coco_of(count)


def check_untold(said: Metadata | None, model: Model, source: str) -> None:
    """Refuse a file of this family that was trained with another setting than the model's where no tensor tells."""
    for path, theirs, own in _contradictions(model.config, said.config if said else {}):
        raise CheckpointError(
            f"{source} was trained with {path}={theirs}, this model has {path}={own}",
            hint=f"make it the same: --set model.{path}={theirs}",
        )


def _contradictions(config: Any, said: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings that no tensor tells and that a file has otherwise: the path, the file's value, ours."""
    for field in fields(config):
        own, theirs = getattr(config, field.name), said.get(field.name)
        if is_dataclass(own) and isinstance(theirs, Mapping):
            yield from _contradictions(own, theirs, f"{where}{field.name}.")
        elif "question" in field.metadata and theirs not in (None, own):
            yield where + field.name, theirs, own


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    family: Family[Any],
    config: Any,
    *,
    layout: str | None = None,
    classes: tuple[Categories | None, Categories] | None = None,
    source: str = "the weights",
    may_differ: str | None = None,
) -> LoadReport:
    """Fill `module` with the tensors of a file; all of them, or a CheckpointError that lists what does not fit.

    Tensors whose names, in the model or in the file, match the pattern `may_differ` may be missing or left over.

    `classes` (those of the file if known, those of the model) allows other classes: rows of the class heads are taken over
    by name, the others keep their fresh values.
    """
    layout = layout or recognise(tensors, family, config, _shapes(module))
    try:
        mapped = keymap.apply(_map(family, layout, config), tensors)
    except CheckpointError as error:  # a tensor that variants share, and this file does not
        variant = owner(tensors, family)
        hint = error.hint if variant is None else _name_it(family, variant, config)
        raise CheckpointError(f"{source}: {error.message}", hint=hint) from None
    report = compare(mapped, _shapes(module), layout)
    values = mapped.tensors
    if classes is not None and classes[0] != classes[1]:
        values, report = _remake(module, mapped, report, _class_heads(family, config), classes)
    odd = report.missing + report.unexpected
    if report.reshaped or not all(may_differ and re.search(may_differ, name) for name in odd):
        raise _misfit(report, family, config, source, tensors)
    extra = {name for name in values if name not in module.state_dict()} if odd else set()
    module.load_state_dict({n: x for n, x in values.items() if n not in extra}, strict=not odd)
    return report


def recognise(
    tensors: Mapping[str, Tensor], family: Family[Any], config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """The layout under whose map the file fits best, tried on shapes alone; ours wins a tie."""
    empty = _empty(tensors)
    best, fewest = NATIVE, None
    for layout in (NATIVE, *family.key_maps):
        try:
            mapped = keymap.apply(_map(family, layout, config), empty)
        except CheckpointError:  # two names meet: not this layout
            continue
        report = compare(mapped, shapes, layout)
        misfits = len(report.missing) + len(report.unexpected)
        if fewest is None or misfits < fewest:
            best, fewest = layout, misfits
    return best


def compare(mapped: Mapped, shapes: Mapping[str, tuple[int, ...]], layout: str) -> LoadReport:
    """The file against the model, name by name."""
    found = {name: tuple(tensor.shape) for name, tensor in mapped.tensors.items()}
    common = [name for name in shapes if name in found]
    return LoadReport(
        layout=layout,
        kept=tuple(name for name in common if found[name] == shapes[name]),
        missing=tuple(name for name in shapes if name not in found),
        unexpected=tuple(n for name in found if name not in shapes for n in mapped.origin[name]),
        reshaped=tuple(Reshaped(n, found[n], shapes[n]) for n in common if found[n] != shapes[n]),
        dropped=mapped.dropped,
        filled=mapped.filled,
    )


def fit(tensors: Mapping[str, Tensor], family: Family[Any], config: Any, module: nn.Module) -> LoadReport:
    """How a file would fit a module, which may be on the meta device; nothing is loaded."""
    shapes = _shapes(module)
    layout = recognise(tensors, family, config, shapes)
    return compare(keymap.apply(_map(family, layout, config), _empty(tensors)), shapes, layout)


def count_classes(
    tensors: Mapping[str, Tensor], family: Family[Any], config: Any, num_classes: int, module: nn.Module
) -> int:
    """The classes of a file that does not say: those of `module` (built for `num_classes`) and what its heads have more."""
    heads = _class_heads(family, config)
    more = _more_rows(r for r in fit(tensors, family, config, module).reshaped if r.name in heads)
    return num_classes + more.pop() if len(more) == 1 else num_classes


def _more_rows(tensors: Iterable[Reshaped]) -> set[int]:
    return {r.file[0] - r.model[0] for r in tensors if _only_rows(r)}


def _empty(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shapes alone."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def _map(family: Family[Any], layout: str, config: Any) -> KeyMap:
    return KeyMap() if layout == NATIVE else family.key_maps[layout](config)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _only_rows(reshaped: Reshaped) -> bool:
    return len(reshaped.file) == len(reshaped.model) > 0 and reshaped.file[1:] == reshaped.model[1:]


def _remake(
    module: nn.Module,
    mapped: Mapped,
    report: LoadReport,
    heads: Mapping[str, int],
    classes: tuple[Categories | None, Categories],
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors with rows a class rearranged: by name from the file, the others fresh."""
    old, new = classes
    own, values = module.state_dict(), dict(mapped.tensors)
    names = [n for n, extra in heads.items() if n in values and _may_differ(values[n], own[n], old, extra)]
    pairs = (
        [(ours, int(theirs)) for ours, theirs in enumerate(labels_in(new, old)) if theirs >= 0] if old else []
    )
    for name in names:
        rows, given, extra = own[name].clone(), values[name], heads[name]
        for ours, theirs in pairs:
            rows[ours] = given[theirs]
        if old and extra:  # "no object", or what else a paper has behind the classes
            rows[-extra:] = given[-extra:]
        values[name] = rows
    return values, replace(
        report,
        kept=tuple(n for n in report.kept if n not in names),
        reshaped=tuple(r for r in report.reshaped if r.name not in names),
        remade=tuple(names),
        copied_classes=tuple(new.names[ours] for ours, _ in pairs),
    )


def _class_heads(family: Family[Any], config: Any) -> dict[str, int]:
    """The tensors with a row a class, and how many rows more: found by building for one class and for two."""
    with torch.device("meta"):
        one, two = (_shapes(family.build_model(config, count)) for count in (1, 2))
    return {name: shape[0] - 1 for name, shape in one.items() if shape != two[name]}


def _may_differ(given: Tensor, own: Tensor, old: Categories | None, extra: int) -> bool:
    """Same but for the number of rows; which is that of the file's classes, where they are known."""
    return given.shape[1:] == own.shape[1:] and (old is None or len(given) == len(old) + extra)


def _misfit(
    report: LoadReport, family: Family[Any], config: Any, source: str, tensors: Mapping[str, Tensor]
) -> CheckpointError:
    total = len(report.kept) + len(report.missing) + len(report.reshaped)
    if report.reshaped and not report.missing and not report.unexpected:
        hint = _other_classes(report, _class_heads(family, config)) or _configured(family, config)
    elif (variant := owner(tensors, family)) is not None:
        hint = _name_it(family, variant, config)
    elif len(report.kept) < total / 2:
        hint = "the file is of another model: see `detr zoo list`"
    else:
        hint = f"the file is of another variant of {family.name}, or of another configuration"
    fits = f"{len(report.kept)} of {total} tensors fit (layout {report.layout})"
    return CheckpointError(f"{source} does not fit this model: {fits}; {report}", hint=hint)


def _other_classes(report: LoadReport, heads: Mapping[str, int]) -> str | None:
    """What to type where only the number of classes differs."""
    if not report.only_rows or any(r.name not in heads for r in report.reshaped):
        return None
    first = report.reshaped[0]
    given, own = first.file[0] - heads[first.name], first.model[0] - heads[first.name]
    return (
        f"the file has {given} classes, this model {own}: build it with num_classes={given}, "
        "or give its classes=… and rows are taken over by name"
    )


def owner(tensors: Mapping[str, Tensor], family: Family[Any]) -> Variant[Any] | None:
    """The variant that a file is of, whatever its classes; None where it is of none."""
    empty = _empty(tensors)
    for variant in family.variants:
        with torch.device("meta"):
            shapes = _shapes(family.build_model(variant.config, variant.num_classes))
        layout = recognise(empty, family, variant.config, shapes)
        report = compare(keymap.apply(_map(family, layout, variant.config), empty), shapes, layout)
        if not report.missing and not report.unexpected and all(map(_only_rows, report.reshaped)):
            return variant
    return None


def _name_it(family: Family[Any], variant: Variant[Any], config: Any) -> str:
    name, (base, changed) = f"{family.name}/{variant.name}", _changed(family, config)
    if base is variant and changed:  # it was named; what does not fit is what --set made of it
        return f"the file is of {name} as it stands: leave out --set of {_some(tuple(changed))}"
    return f"the file is of {name}: type --model {name}"


def _configured(family: Family[Any], config: Any) -> str:
    base, changed = _changed(family, config)
    made = f" than {family.name}/{base.name} with --set of {_some(tuple(changed))}" if changed else ""
    return f"the file is of another configuration{made}"


def _changed(family: Family[Any], config: Any) -> tuple[Variant[Any], list[str]]:
    """The variant that a configuration is nearest to, and the settings in which it differs."""
    own = settings(config)

    def other(variant: Variant[Any]) -> list[str]:
        theirs = settings(variant.config)
        return [path for path in own if own[path] != theirs.get(path)]

    return min(((v, other(v)) for v in family.variants), key=lambda pair: len(pair[1]))


def _some(names: tuple[Any, ...]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, … {len(names) - SHOWN} more"
