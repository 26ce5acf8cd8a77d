"""What checks run on: small models with seeded weights, two pictures, some objects."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from detrcli.plugins import Model
from detrcli.profile.run import build_on_meta
from detrcli.types import Target

SMALL = 5_000_000  # parameters up to which a model is run, not only declared
CLASSES = 3

_last: list[tuple[Model, nn.Module]] = []


def skeleton(model: Model) -> nn.Module:
    """The model with names and shapes but no numbers. The last one is kept, for the checks of a model follow each other."""
    if not _last or _last[0][0] != model:
        _last[:] = [(model, build_on_meta(model))]
    return _last[0][1]


def run_small(model: Model) -> Iterator[nn.Module]:
    """The model with seeded weights, in eval mode; nothing when it is too large to run in a test."""
    if model.variant.params <= SMALL:
        torch.manual_seed(0)
        yield model.build(CLASSES).eval()


def pictures() -> tuple[Tensor, Tensor]:
    """Two pictures of different size, padded."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 96, 128, generator=generator)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = True, True
    images[mask[:, None].expand_as(images)] = 0
    return images, mask


def objects(count: int) -> Target:
    generator = torch.Generator().manual_seed(count)
    boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.3
    return Target(
        torch.arange(count) % CLASSES, boxes, {"masks": torch.ones(count, 96, 128, dtype=torch.uint8)}
    )


def two_targets() -> list[Target]:
    return [objects(2), objects(3)]
