"""The few collectives that the toolkit needs; every one is a no-op in a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from detrcli.errors import UsageError

T = TypeVar("T")
_apart = False


def running() -> bool:
    return dist.is_available() and dist.is_initialized() and not _apart


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process counts as the only one: what it tries needs no answer from the others, who may wait."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def rank() -> int:
    return dist.get_rank() if running() else 0


def world_size() -> int:
    return dist.get_world_size() if running() else 1


def is_main() -> bool:
    """True in the one process that writes files and talks."""
    return rank() == 0


def own_device(device: str) -> str:
    """The device of this rank: of several processes each takes a GPU of its own."""
    if running() and ":" in device:
        raise UsageError(
            f"{device} is one device, for {world_size()} processes",
            hint="choose which with CUDA_VISIBLE_DEVICES, and leave --device and DETR_DEVICE out; where a run goes on: "
            "--device cuda --allow-change device",
        )
    if running() and device == "cuda":
        return f"cuda:{torch.cuda.current_device()}"
    return device


def mean_over_ranks(value: float, device: torch.device) -> Tensor:
    """The mean of a number over all ranks, as a float scalar on `device`."""
    return average(torch.tensor(float(value), device=device))


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    if running():
        dist.all_reduce(values)
        values /= world_size()
    return values


def mean_number(value: float, device: torch.device) -> float:
    """The same on the host; alone, the device is not asked, so nothing waits for it."""
    return mean_over_ranks(value, device).item() if running() else value


def largest(value: int, device: torch.device) -> int:
    """The largest that some rank has, on every rank."""
    if not running():
        return value
    box = torch.tensor(value, device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def from_main(value: T) -> T:
    """What rank 0 has, on every rank."""
    box: list[T] = [value]
    if running():
        dist.broadcast_object_list(box)
    return box[0]


def all_of(value: T) -> list[T]:
    """What each rank has, on every rank, in the order of the ranks."""
    if not running():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return [value for value in values if value is not None]
