"""Values as annotation files have them: numbers that may be none, boxes that may be anything."""

from __future__ import annotations

import math
from typing import Any

from detrcli.data.defects import Defects


def whole(value: Any) -> int | None:
    """A whole number that an array can hold, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if -(2**63) <= value < 2**63 else None


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -1e300 < value < 1e300 or isinstance(value, float) else None


def box(value: Any, defects: Defects, file: str, where: str) -> list[float] | None:
    """Four finite numbers; None, and a defect, for anything else."""
    numbers = [number(v) for v in value] if isinstance(value, list) else []
    found = [n for n in numbers if n is not None]
    if len(found) != 4 or len(numbers) != 4:
        defects.add("bad-box", file, where, str(value)[:60])
        return None
    if not all(math.isfinite(n) for n in found):
        defects.add("non-finite-box", file, where, str(value))
        return None
    return found
