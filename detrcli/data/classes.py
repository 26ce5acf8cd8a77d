"""The classes of a data set's splits: compared by name, and made one list for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from detrcli.data.annotations import Array, Dataset
from detrcli.data.defects import Defects
from detrcli.types import Categories


def labels_in(classes: Categories, other: Categories) -> Array:
    """For each class its label in another list, -1 where that has none: by id and name, else by name."""
    exact = {pair: label for label, pair in enumerate(zip(other.ids, other.names, strict=True))}
    named = {name.casefold(): label for label, name in enumerate(other.names)}
    pairs = zip(classes.ids, classes.names, strict=True)
    return np.array([exact.get(pair, named.get(pair[1].casefold(), -1)) for pair in pairs], np.int64)


def compared(dataset: Dataset, train: Categories) -> Defects:
    """Where the classes of a split are not those that a model learns, which are the ones of `train`."""
    defects, own = Defects(), dataset.categories
    if own == train:
        return defects
    defects.add("categories-differ", dataset.name, dataset.split, f"{_told(own)}; train has {_told(train)}")
    used = np.bincount(dataset.annotations.labels, minlength=len(own))
    for label in np.flatnonzero((labels_in(own, train) < 0) & (used > 0)):
        detail = f"{own.names[label]}, {used[label]} objects"
        defects.add("unlearned-category", dataset.name, dataset.split, detail)
    return defects


def united(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The splits with one list of classes for all: that of the first, and after it what only the others name."""
    first, *others = (dataset.categories for dataset in splits.values())
    for classes in others:
        new = [classes.names[label] for label in np.flatnonzero(labels_in(classes, first) < 0)]
        free = max(first.ids, default=0) + 1
        first = Categories((*first.ids, *range(free, free + len(new))), (*first.names, *new))
    return {split: _with_classes(dataset, first) for split, dataset in splits.items()}


def _with_classes(dataset: Dataset, classes: Categories) -> Dataset:
    a = dataset.annotations
    labels = labels_in(dataset.categories, classes)[a.labels]
    return dataclasses.replace(
        dataset, categories=classes, annotations=dataclasses.replace(a, labels=labels, shelf=None)
    )


def _told(classes: Categories) -> str:
    pairs = [f"{key} {name}" for key, name in zip(classes.ids, classes.names, strict=True)]
    return ", ".join(pairs[:3]) + ("" if len(pairs) <= 3 else f" … ({len(pairs)} classes)")
