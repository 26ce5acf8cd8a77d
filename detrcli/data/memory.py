"""Memory for batches that is used again.

A batch of four COCO pictures takes 40 MB. Fresh memory of that size comes from the system page by page, zeroed, which
costs more than computing what is written into it. Here a buffer returns to a pool when the last tensor on it has gone:
torch holds on to the array it was made from for as long as any view of the tensor lives, so the array's end is the
right moment, whoever held the tensor.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_KEPT = 3  # free buffers: one being filled, one in use, one on its way
_WASTE = 3  # a buffer serves batches down to a third of its size
_free: list[npt.NDArray[np.float32]] = []


def recycled(shape: tuple[int, ...]) -> Tensor:
    """An unset float tensor, on memory that an earlier one has left where there is some of the right size."""
    count = math.prod(shape)
    buffer = _take(count)
    array = buffer[:count]
    weakref.finalize(array, _give_back, buffer).atexit = False
    return torch.from_numpy(array).view(shape)


def _take(count: int) -> npt.NDArray[np.float32]:
    for place, buffer in enumerate(_free):
        if count <= buffer.size <= _WASTE * max(count, 2**20):
            return _free.pop(place)
    return np.empty(count, np.float32)


def _give_back(buffer: npt.NDArray[np.float32]) -> None:
    _free.append(buffer)
    _free.sort(key=len)
    del _free[: max(0, len(_free) - _KEPT)]  # the smallest go first
