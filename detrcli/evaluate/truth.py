"""The ground truth that a name means."""

from __future__ import annotations

import os
from pathlib import Path

from detrcli.data import catalog
from detrcli.data.annotations import Dataset


def load_truth(
    data: str,
    split: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    *,
    pictures: bool = True,
) -> Dataset:
    """A split with annotations that can be scored against: `val`, or the only one there is, unless another is named.

    Damaged annotations are refused by name. Without `pictures`, which saved detections do not need, they may be missing.
    """
    root = None if data_root is None else Path(data_root)
    source = catalog.find(data, root)
    if split is None:
        split = next(iter(source.splits)) if len(source.splits) == 1 else "val"
    if pictures:
        return catalog.resolve(data, split, root)
    dataset = source.load(split)
    dataset.defects.refuse(data)
    return dataset
