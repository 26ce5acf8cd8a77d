"""detrcli: detection transformers from the command line and from Python.

    import detrcli

    detrcli.list_models()                               names, as `detr zoo list` shows them
    model = detrcli.create_model("detr/r50")            an untrained module; model(images, mask) gives an Output
    detrcli.load_weights(model, "weights.safetensors")  any layout that is in use; says what fitted
    predictor = detrcli.load("detr/r50")                ready to predict
    predictor.predict("street.jpg")
    detrcli.train(…), .evaluate(…), .export(…)          the verbs of the command line

Names are imported when first used, so that `import detrcli` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import detrcli.evaluate
import detrcli.export
import detrcli.predict
import detrcli.train  # noqa: F401  # empty packages; imported first, they leave their names to the verbs
from detrcli.api import evaluate, export, load, predict, train
from detrcli.version import __version__

if TYPE_CHECKING:
    from detrcli.models import create_model, list_models, load_weights

_HOMES = {
    "create_model": "detrcli.models",
    "list_models": "detrcli.models",
    "load_weights": "detrcli.models",
}

__all__ = [
    "__version__",
    "create_model",
    "evaluate",
    "export",
    "list_models",
    "load",
    "load_weights",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detrcli' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
