"""A detector that needs no training: it finds red and blue spots, and only those that are large enough in what it is shown.

It gives every test an answer that is known, and the blindness for small things that tiles are for.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import nn

from detrcli.plugins.contract import Preprocess
from detrcli.postprocess import sigmoid_topk
from detrcli.predict.run import Predictor
from detrcli.types import Categories, Output

RED, BLUE = (255, 0, 0), (0, 0, 255)
CATEGORIES = Categories((3, 17), ("red spot", "blue spot"))
PREPROCESS = Preprocess(short_side=240, long_side=512, mean=(0, 0, 0), std=(1, 1, 1))
SMALLEST = 8  # pixels of the input in width and height, below which a spot is not seen
QUERIES = 120


class Seen(list):
    """What a model and its copies were shown, in one list: evaluation runs a faster copy."""

    def __deepcopy__(self, memo):
        return self


class Spotter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.sizes = Seen()  # of the batches it was shown

    def forward(self, images, mask=None):
        self.sizes.append(tuple(images.shape))
        mask = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool) if mask is None else mask
        answers = [self._one(image, padding) for image, padding in zip(images, mask, strict=True)]
        return Output(torch.stack([a[0] for a in answers]), torch.stack([a[1] for a in answers]))

    def _one(self, image, padding):
        height, width = int((~padding).any(1).sum()), int((~padding).any(0).sum())
        image = image[:, :height, :width].float()
        logits = torch.full((QUERIES, 2), -12.0)
        boxes = torch.full((QUERIES, 4), 0.5)
        row = 0
        for label, (this, other) in enumerate(((0, 2), (2, 0))):
            spots, _ = ndimage.label(((image[this] > 0.5) & (image[other] < 0.5) & (image[1] < 0.5)).numpy())
            for ys, xs in ndimage.find_objects(spots):
                h, w = ys.stop - ys.start, xs.stop - xs.start
                if min(h, w) < SMALLEST or row >= QUERIES:
                    continue
                centre = ((xs.start + xs.stop) / 2 / width, (ys.start + ys.stop) / 2 / height)
                boxes[row] = torch.tensor((*centre, w / width, h / height))
                logits[row, label] = 2 + min(w * h, 1e4) / 1e4  # the larger the surer
                row += 1
        return logits, boxes


def spotter(**changes) -> Predictor:
    parts = {
        "name": "spotter/plain",
        "weights": "made by hand",
        "model": Spotter().eval(),
        "categories": CATEGORIES,
        "preprocess": PREPROCESS,
        "postprocess": sigmoid_topk,
        "device": torch.device("cpu"),
    }
    return Predictor(**{**parts, **changes})


def scene(size=(320, 240), spots=((20, 30, 80, 90, RED), (150, 100, 250, 160, BLUE))) -> Image.Image:
    """A grey picture with filled rectangles (x1, y1, x2, y2, colour), x2 and y2 outside."""
    picture = Image.new("RGB", size, (128, 128, 128))
    pen = ImageDraw.Draw(picture)
    for x1, y1, x2, y2, colour in spots:
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    return picture


def scatter(size, count, side, seed=0):
    """Spots of one size that do not touch."""
    rng = np.random.default_rng(seed)
    cells = [
        (x, y)
        for x in range(side, size[0] - 2 * side, 3 * side)
        for y in range(side, size[1] - 2 * side, 3 * side)
    ]
    chosen = rng.permutation(len(cells))[:count]
    return tuple(
        (*cells[i], cells[i][0] + side, cells[i][1] + side, (RED, BLUE)[k % 2]) for k, i in enumerate(chosen)
    )
