"""How many processors this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

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
