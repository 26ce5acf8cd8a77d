"""What a paper declares (`contract`) and how it is found (`registry`). Free of torch."""

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
from detrcli.plugins.registry import Broken, Found, Loaded, Model, broken, models, plugins, resolve

__all__ = [
    "API",
    "Broken",
    "Family",
    "Found",
    "Loaded",
    "Model",
    "Paper",
    "Plugin",
    "Preprocess",
    "Published",
    "Recipe",
    "Variant",
    "Weights",
    "broken",
    "models",
    "plugins",
    "resolve",
]
