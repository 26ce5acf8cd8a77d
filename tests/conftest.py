"""Shared by every test: one thread, no network beyond loopback, no user's folders."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in children: tests run side by side

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_places(tmp_path_factory, monkeypatch):
    """Runs, caches and settings of a test are its own."""
    base = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("DETR_HOME", str(base / "detrcli"))
    monkeypatch.setenv("DETR_RUNS", str(base / "runs"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(base / "config"))
    for name in ("DETR_PLUGINS", "DETR_DATA", "DETR_DEVICE", "DETR_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Only loopback answers; anything else is a defect of the test or of the code."""
    connect = socket.socket.connect

    def checked(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(
            ("127.", "::1", "localhost")
        ):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
