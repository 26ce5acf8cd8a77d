"""From chosen weights to a model that predicts."""

from __future__ import annotations

from functools import partial

from detrcli.nn.inference import choose_device
from detrcli.nn.speed import fastest
from detrcli.predict.run import Predictor
from detrcli.weights.opened import open_weights
from detrcli.weights.resolve import Choice


def load(choice: Choice, device: str | None = None) -> Predictor:
    """A predictor with the chosen weights."""
    place = choose_device(device)
    opened = open_weights(choice)
    family, config = opened.model.family, opened.model.config
    return Predictor(
        name=opened.model.name,
        weights=choice.why,
        model=fastest(opened.module.to(place)),
        categories=opened.categories,
        preprocess=opened.preprocess,
        postprocess=partial(family.postprocess, config),
        device=place,
        only_batch=family.eval_batch_size(config),
    )
