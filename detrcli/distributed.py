"""The few collectives that the toolkit needs; every one is a no-op in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def running() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if running() else 0


def world_size() -> int:
    return dist.get_world_size() if running() else 1


def is_main() -> bool:
    """True in the one process that writes files and talks."""
    return rank() == 0


def mean_over_ranks(value: float, device: torch.device) -> Tensor:
    """The mean of a number over all ranks, as a float scalar on `device`."""
    total = torch.tensor(float(value), device=device)
    if running():
        dist.all_reduce(total)
        total /= world_size()
    return total
