from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what this machine remembers."""
    monkeypatch.setenv("DETR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DETR_RUNS", str(tmp_path / "runs"))
