"""What an exported file is verified on: batches of parts of a photograph and of drawings, of several sizes, padded and not."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detrcli.data.images import read_image
from detrcli.data.loader import collate
from detrcli.data.shapes import PRESETS, SPLITS, Shapes
from detrcli.data.transforms import normalise, scale_pixels
from detrcli.export.plan import Request
from detrcli.export.runtime import fitted
from detrcli.plugins.contract import Preprocess
from detrcli.types import Sample, Target

# Grace Hopper, 1984; of the U.S. Navy, in the public domain
PHOTOGRAPH = Path(__file__).parent / "photograph.jpg"
Size = tuple[int, int]  # height, width

# the sides of pictures as parts of the short side that the model is meant for, one pair a picture
SHAPES: Mapping[str, Sequence[tuple[float, float]]] = {
    "one picture": ((0.53, 0.67),),
    "two pictures, padded": ((0.4, 0.36), (0.31, 0.41)),
    "five pictures, padded": ((0.28, 0.36), (0.28, 0.3), (0.2, 0.36), (0.24, 0.24), (0.28, 0.36)),
}
LEAST = 48  # pixels, of the shortest side of them all


def batches(request: Request, preprocess: Preprocess, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, images (B, 3, H, W) and mask (B, H, W) of each case."""
    unit = max(
        preprocess.short_side,
        LEAST / min(side for pairs in SHAPES.values() for pair in pairs for side in pair),
    )
    for name, shares in SHAPES.items():
        if request.size is not None:
            sizes = [within(request.size, share) for share in shares]
            images, mask = fitted(*prepared(sizes, preprocess, seed), request.size)
        else:
            sizes = [(round(height * unit), round(width * unit)) for height, width in shares]
            images, mask = prepared(sizes, preprocess, seed)
        if "batch" not in request.dynamic and len(shares) > 1:
            name, (images, mask) = f"one of {name}", most_padded(images, mask)
        yield name, images, mask


def most_padded(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One picture of a batch, as it lies there."""
    row = int(mask.flatten(1).sum(1).argmax())
    return images[row : row + 1], mask[row : row + 1]


def within(size: Size, share: tuple[float, float]) -> Size:
    """A part of a fixed size; the rest of it is padding."""
    return max(1, round(size[0] * share[0] * 1.49)), max(1, round(size[1] * share[1] * 1.49))


def prepared(sizes: Sequence[Size], preprocess: Preprocess, seed: int) -> tuple[Tensor, Tensor]:
    """A batch as a model takes it: photograph and drawing in turn."""
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    samples = [
        Sample(normalise(scale_pixels(picture(i, size, seed), size), preprocess), nothing, i, size)
        for i, size in enumerate(sizes)
    ]
    batch = collate(samples)
    return batch.images.contiguous(), batch.mask


def picture(index: int, size: Size, seed: int) -> Tensor:
    """(3, H, W) uint8; a part of the photograph has the shape of `size`."""
    if index % 2:
        return Shapes(PRESETS["hard"], SPLITS["test"], seed).read(index)
    return part(photograph(), size, np.random.default_rng([seed, index]))


def part(whole: Tensor, size: Size, rng: np.random.Generator) -> Tensor:
    """A random part of a picture that has the shape of `size`, half as large as it could be or larger."""
    space = whole.shape[1:]
    scale = rng.uniform(0.5, 1) * min(have / want for have, want in zip(space, size, strict=True))
    height, width = (max(1, int(scale * want)) for want in size)
    top, left = int(rng.integers(space[0] - height + 1)), int(rng.integers(space[1] - width + 1))
    return whole[:, top : top + height, left : left + width]


@functools.cache
def photograph() -> Tensor:
    """(3, H, W) uint8"""
    return read_image(PHOTOGRAPH)
