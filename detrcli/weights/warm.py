"""Starting a training from weights of a kindred model: what fits is taken, what is new keeps its fresh values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from detrcli.errors import CheckpointError, UsageError
from detrcli.plugins.registry import Model, resolve
from detrcli.types import Categories
from detrcli.weights.load import LoadReport, check_untold, fit, load_state, owner, pair_of, read
from detrcli.weights.resolve import Choice, choose, is_family

SHOWN = 10  # classes named


def starting_from(model: str, weights: str | None) -> Model:
    """The model that is trained when it starts from weights: of a bare family the variant that the file says it is of; one that
    does not say is asked about where tensors do not tell. Weights of another family leave the default."""
    wanted = resolve(model)
    if weights is None or not is_family(model):
        return wanted
    with suppress(UsageError):
        inside = choose(None, weights).model
        return inside if inside.family.name == wanted.family.name else wanted
    try:  # it does not say
        return choose(model, weights).model
    except CheckpointError:
        if not _is_donors(wanted, weights):
            raise
        return wanted


def _is_donors(model: Model, weights: str) -> bool:
    """Whether a file of others holds a model of one of the family's donors."""
    tensors, _ = read(choose(model.name, weights))
    return any(owner(tensors, resolve(donor).family) for donor in model.family.donors)


def warm_start(
    module: nn.Module,
    source: str | Path,
    model: Model,
    *,
    classes: Categories | None = None,
    offline: bool = False,
) -> LoadReport:
    """`load_weights`, except that weights of the family's donors may lack and have more tensors where the family says so.

    The report's `missing` are then the tensors that are new, `unexpected` those of the file that were left out.
    """
    choice = _choose(model, str(source))
    tensors, said = read(choice, offline=offline)
    family, config = model.family, model.variant.config
    pair = pair_of(choice, tensors, said, module, model, classes, offline=offline)
    if choice.model.family.name == family.name:
        check_untold(said, model, str(choice.source))
    donor = family.donors.get(resolve(said.model).family.name) if said else _donor_of(module, tensors, model)
    return load_state(
        module, tensors, family, config, classes=pair, source=str(choice.source), may_differ=donor
    )


def _donor_of(module: nn.Module, tensors: Mapping[str, Tensor], model: Model) -> str | None:
    """Where a file of others may differ. A donor's has tensors that this family lacks; else it is a part of its own."""
    left_over = fit(tensors, model.family, model.config, module).unexpected
    fits = (p for p in model.family.donors.values() if left_over and all(re.search(p, n) for n in left_over))
    return next(fits, None)


def _choose(model: Model, source: str) -> Choice:
    """A file of ours says which model it holds: this one, or one of a donor family."""
    for donor in model.family.donors:
        with suppress(CheckpointError):
            return choose(donor, source)
    return choose(model.name, source)


def told(report: LoadReport) -> list[str]:
    """What was taken, what is new, what was left out: a line each."""
    lines = [f"{len(report.kept)} tensors kept"]
    lines += [f"made anew for other classes: {_rows(report)}"] if report.remade else []
    lines += [f"new: {by_pattern(report.missing)}"] if report.missing else []
    lines += [f"left out: {by_pattern(report.unexpected)}"] if report.unexpected else []
    return lines


def _rows(report: LoadReport) -> str:
    """The tensors with a row a class, and the classes that found theirs in the file by name."""
    first, more = report.copied_classes[:SHOWN], len(report.copied_classes) - SHOWN
    taken = ", ".join([*first, *([f"{more} more"] if more > 0 else [])])
    return f"{by_pattern(report.remade)}; rows taken over: {taken or 'none, no class of the file has such a name'}"


def by_pattern(names: Sequence[str]) -> str:
    """Names with their numbers as `*`, each once with its count.

    >>> by_pattern(["layers.0.weight", "layers.1.weight", "bias"])
    'layers.*.weight (2), bias'
    """
    counts: Iterable[tuple[str, int]] = Counter(re.sub(r"\b\d+\b", "*", name) for name in names).items()
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts)
