"""What the machine gives a run: processors, threads, memory, and room on the disk."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from detrcli.errors import DetrError
from detrcli.files import left_over

_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))


def processors() -> int:
    """Those that this process may use: its affinity, and what a container's quota allows.

    More threads than that take turns, and a step of many small operations, each of which waits for the slowest thread,
    becomes several times slower than with one.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, allowed if quota is None else min(allowed, math.floor(quota)))


def _quota() -> float | None:
    """Processors' worth of time that the container may use, of cgroup version 2 or 1."""
    new, old = _QUOTAS
    try:
        if new.is_file():
            quota, period = new.read_text().split()
        else:
            quota, period = old.read_text(), old.with_name("cpu.cfs_period_us").read_text()
        return None if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def choose_threads(workers: int) -> int:
    """Share the processors between the ranks of this machine and the workers of each, unless `OMP_NUM_THREADS` decides."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        most = max(1, processors() // ranks - workers)
        if torch.get_num_threads() > most:
            torch.set_num_threads(most)
    return torch.get_num_threads()


def readers(device: str) -> int:
    """Processes that read pictures for a device, unless the user says: a GPU's share of the processors, at most eight; none for
    a CPU, whose processors the model needs."""
    if not device.startswith("cuda"):
        return 0
    return min(8, processors() // max(1, torch.cuda.device_count()))


def peak_bytes(device: str) -> int:
    """The most memory that was held at once: of a GPU by this process, else by the process itself; 0 if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_reserved(device))
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def all_bytes(device: str) -> int:
    """What there is of it; 0 if unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def enough_room(folder: Path, net: nn.Module, *, averaged: bool) -> None:
    """Three checkpoints must fit before a folder is made: the last, the one before, and the next while it is written. A run that
    goes on has some of them, and what a kill left of another, which is taken away."""
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    learned = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    kept = [*folder.glob("state*.pt"), *folder.glob("*.safetensors"), *left_over(folder)]
    needed = 3 * (size + 2 * learned + averaged * size) + 2 * size - sum(p.stat().st_size for p in kept)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DetrError(
            f"{folder} has {free / 2**30:.2f} GiB free; the run's checkpoints need {needed / 2**30:.2f}",
            hint="free some space, or choose another place with --out or DETR_RUNS",
        )
