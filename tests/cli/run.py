"""Running the real command in a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    run = subprocess.run(
        [sys.executable, "-m", "detrcli", *map(str, args)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"} | (env or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Done(run.returncode, run.stdout, run.stderr)
