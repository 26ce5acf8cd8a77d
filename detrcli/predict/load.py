"""From a name to a model that predicts: which weights, what they hold, onto which device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from detrcli.config import from_plain
from detrcli.data.coco_classes import coco_channels, coco_classes
from detrcli.nn.inference import choose_device
from detrcli.plugins.contract import Family, Variant
from detrcli.predict.run import Predictor
from detrcli.types import Categories
from detrcli.weights.load import count_classes, load_state, read
from detrcli.weights.metadata import Metadata
from detrcli.weights.resolve import choose


def load(name: str | None = None, weights: str | None = None, device: str | None = None) -> Predictor:
    """A predictor for `FAMILY[/VARIANT]`, with the named weights or the best there are for it.

    Classes, configuration and preprocessing come from the weights file; files of others are taken as trained on COCO when
    the number of their classes says so, else their classes are numbered.
    """
    place = choose_device(device)
    choice = choose(name, weights)
    tensors, said = read(choice)
    family, variant = choice.model.family, choice.model.variant
    config = from_plain(type(variant.config), said.config) if said and said.config else variant.config
    count = said.num_classes if said else _count(tensors, family, variant)
    model = family.build_model(config, count)
    load_state(model, tensors, family, config, source=str(choice.source))
    return Predictor(
        name=choice.model.name,
        weights=choice.why,
        model=model.eval().to(place),
        categories=_categories(said, count),
        preprocess=said.preprocess if said else variant.preprocess,
        postprocess=partial(family.postprocess, config),
        device=place,
        only_batch=family.eval_batch_size(config),
    )


def _count(tensors: dict[str, Any], family: Family[Any], variant: Variant[Any]) -> int:
    with torch.device("meta"):
        blank = family.build_model(variant.config, variant.num_classes)
    return count_classes(tensors, family, variant.config, variant.num_classes, blank)


def _categories(said: Metadata | None, count: int) -> Categories:
    if said is not None and said.categories is not None:
        return said.categories
    for known in (coco_channels(), coco_classes()):
        if len(known) == count:
            return known
    return Categories(tuple(range(count)), tuple(f"class {i}" for i in range(count)))
