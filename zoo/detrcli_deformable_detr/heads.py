"""The prediction heads and how they start (sec. A.3 of the paper; the values are those of its code)."""

from __future__ import annotations

import math

from torch import nn

from detrcli.nn.layers import MLP

PRIOR = 0.01  # probability that a fresh class head gives every class


def class_linear(width: int, classes: int) -> nn.Linear:
    """Class logits that all start near the prior, so that the focal loss starts small."""
    head = nn.Linear(width, classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def box_mlp(width: int, *, size: float) -> MLP:
    """A box head that starts with the reference itself; `size` is the logit that width and height start from."""
    head = MLP(width, width, 4, 3)
    last = head.layers[-1]
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]  # an element of a ModuleList
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    nn.init.constant_(last.bias[2:], size)  # type: ignore[index]
    return head
