"""Cutting one split into several: every class gets its share, and the same seed cuts the same way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from detrcli.data.annotations import Array, Dataset
from detrcli.errors import UsageError


def split(dataset: Dataset, fractions: Mapping[str, float], *, seed: int = 0) -> dict[str, Dataset]:
    """`{"val": 0.1, "test": 0.1}`; the rest is train. Each part has at least one image."""
    wanted = {name: share for name, share in fractions.items() if share > 0}
    if any(not 0 <= share < 1 for share in fractions.values()) or not 0 < sum(wanted.values()) < 1:
        raise UsageError(
            "the parts must be fractions that leave something to train on", hint="--val 0.1 --test 0.1"
        )
    order = _interleaved(_rarest_class(dataset), np.random.default_rng([seed, len(dataset)]))
    parts: dict[str, Dataset] = {}
    start = 0
    for name, share in wanted.items():
        end = start + max(1, round(share * len(dataset)))
        parts[name] = dataset.select(np.sort(order[start:end]))
        start = end
    if start >= len(dataset):
        raise UsageError(f"{len(dataset)} images are too few for {len(wanted) + 1} parts")
    return {"train": dataset.select(np.sort(order[start:])), **parts}


def _rarest_class(dataset: Dataset) -> Array:
    """For each image the label of its rarest class, -1 without objects: what must be spread evenly."""
    a = dataset.annotations
    count = np.bincount(a.labels, minlength=len(dataset.categories))
    rarest = np.full(len(a), -1, np.int64)
    for image in range(len(a)):
        labels = a.objects(image).labels
        if len(labels):
            rarest[image] = labels[np.argmin(count[labels])]
    return rarest


def _interleaved(strata: Array, rng: np.random.Generator) -> Array:
    """An order in which every stretch holds the strata in proportion: the k-th of n images of a stratum stands at (k + u) / n."""
    place = np.empty(len(strata))
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")
