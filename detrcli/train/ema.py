"""Averaged weights: a second model that follows the one in training, and usually scores better."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """w̄ <- d w̄ + (1 - d) w after every step, with d = min(decay, (1 + n) / (10 + n)) so that the start is forgotten soon.

    What is not learned (frozen weights, buffers) is copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        learned: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if pair[1].requires_grad]
        torch._foreach_lerp_([own for own, _ in learned], [other for _, other in learned], 1 - decay)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)

    def state(self) -> dict[str, Tensor | int]:
        return {**self.model.state_dict(), "": self.updates}

    def load(self, state: Mapping[str, Tensor | int]) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.model.load_state_dict(tensors)
        self.updates = int(state.get("", 0))
