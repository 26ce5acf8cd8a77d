"""Running the real command in a real process.

The process is forked from one that has loaded torch, which takes longer than most commands do; nothing of detrcli, and nothing
that reads a setting when it is loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOADED = ["torch", "torchvision", "scipy.optimize", "pycocotools.cocoeval"]
SECONDS = 300

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(LOADED)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def error(self, code: int) -> str:
        """The one line of a user's mistake; never a traceback."""
        assert self.code == code, f"exit {self.code}: {self.err}"
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def detr(
    *args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, stdin: str | None = None
) -> Done:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"} | (env or {})
    with tempfile.TemporaryDirectory() as name:
        streams = Path(name)
        for file, text in (("in", stdin or ""), ("out", ""), ("err", "")):
            (streams / file).write_text(text)
        command = (list(map(str, args)), cwd or Path.cwd(), environment, streams)
        process = forks.Process(target=_command, args=command)
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"detr {args} took more than {SECONDS} s")
        assert process.exitcode is not None
        return Done(process.exitcode, (streams / "out").read_text(), (streams / "err").read_text())


def _command(args: list[str], cwd: Path, environment: dict[str, str], streams: Path) -> None:
    """What the child does: `python -m detrcli` with these arguments, in this place."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    for descriptor, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(streams / name, os.O_RDWR), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["detr", *args]
    from detrcli.cli import main

    main()
