"""From chosen weights to a network that holds them, with all that the file says about its use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detrcli.config import from_plain
from detrcli.data.coco_classes import classes_for
from detrcli.errors import CheckpointError, UsageError
from detrcli.plugins.contract import Preprocess
from detrcli.plugins.registry import Model
from detrcli.types import Categories
from detrcli.weights.load import LoadReport, classes_of_others, count_classes, load_state, read
from detrcli.weights.metadata import Metadata
from detrcli.weights.resolve import Choice


@dataclass(frozen=True, slots=True)
class Opened:
    model: Model  # configured as the file was trained
    module: nn.Module
    categories: Categories
    preprocess: Preprocess
    said: Metadata | None  # None for a file of others
    report: LoadReport


def open_weights(choice: Choice, *, offline: bool = False) -> Opened:
    """Build the model of a choice and fill it.

    Classes, configuration and preprocessing come from the file. The classes of a file of others come from the configuration
    beside it, if that names them; else it is taken as trained on COCO when their number says so, else they are numbered.
    """
    tensors, said = read(choice, offline=offline)
    model = choice.model
    if said and said.config:
        model = _configured(model, said, choice)
    count = said.num_classes if said else _count(tensors, model)
    module = model.build(count)
    report = load_state(module, tensors, model.family, model.config, source=str(choice.source))
    stated = said.categories if said else classes_of_others(choice.source, count, offline=offline)
    return Opened(
        model=model,
        module=module,
        categories=stated or classes_for(count),
        preprocess=said.preprocess if said else model.variant.preprocess,
        said=said,
        report=report,
    )


def _configured(model: Model, said: Metadata, choice: Choice) -> Model:
    """The model as the file says it was trained."""
    try:
        return model.configured(from_plain(type(model.config), said.config))
    except UsageError as error:
        raise CheckpointError(
            f"the configuration inside {choice.source} cannot be used: {error.message}", hint=error.hint
        ) from error


def _count(tensors: Mapping[str, Tensor], model: Model) -> int:
    with torch.device("meta"):
        blank = model.build()
    return count_classes(tensors, model.family, model.config, model.variant.num_classes, blank)
