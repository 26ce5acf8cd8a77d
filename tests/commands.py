"""Running the command line inside the test's process, as the console script runs it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from detrcli.cli import console


@dataclass
class Ended:
    code: int
    out: str
    err: str


def detr(*args: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ended:
    from detrcli.cli.app import main

    monkeypatch.setattr(sys, "argv", ["detr", *map(str, args)])
    for name, value in (("quiet", False), ("verbose", 0), ("debug", False), ("json", False)):
        monkeypatch.setattr(console.settings, name, value)
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    captured = capsys.readouterr()
    return Ended(code, captured.out, captured.err)
