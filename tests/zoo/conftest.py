"""Full-size models are cached while a file's tests run, and given back after it."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_cached_runs(request):
    yield
    for value in vars(request.module).values():
        clear = getattr(value, "cache_clear", None)
        if clear is not None:
            clear()
    gc.collect()
