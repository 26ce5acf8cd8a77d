from __future__ import annotations

import numpy as np
import pytest

from detrcli.data.annotations import Builder, Dataset
from detrcli.data.images import read_image
from tests.spotter import BLUE, CATEGORIES, RED, scene


class Painted:
    """Pictures of a data set, painted from its own boxes."""

    def __init__(self, annotations):
        self.annotations = annotations

    def read(self, index, name, size):
        objects = self.annotations.objects(index)
        spots = [
            (*box[:2].astype(int), *(box[:2] + box[2:]).astype(int), (RED, BLUE)[label])
            for box, label in zip(objects.boxes, objects.labels, strict=True)
        ]
        return read_image(scene((size[1], size[0]), spots))


def painted(images: int = 7, seed: int = 0) -> Dataset:
    """Pictures of different sizes with up to four spots; ids with gaps, in no order."""
    rng = np.random.default_rng(seed)
    builder = Builder()
    number = 0
    for index, image_id in enumerate(rng.permutation(images) * 10 + 5):
        width, height = int(rng.integers(200, 400)), int(rng.integers(200, 400))
        builder.image(int(image_id), f"{image_id}.png", height, width)
        for cell in rng.permutation(4)[: rng.integers(0, 5)]:
            x, y = 5 + (cell % 2) * width // 2, 5 + (cell // 2) * height // 2
            w, h = (int(rng.integers(20, side // 2 - 10)) for side in (width, height))
            number += 1
            builder.add(index, number, int(rng.integers(2)), (x, y, w, h))
    annotations = builder.build()
    return Dataset("painted", "val", CATEGORIES, annotations, Painted(annotations))


@pytest.fixture
def dataset() -> Dataset:
    return painted()
