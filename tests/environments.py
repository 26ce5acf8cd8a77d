"""Clean virtual environments: detrcli and a package are built and installed there, as a user does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.cli.run import detr

ROOT = Path(__file__).parent.parent
OURS = ("pyproject.toml", "README.md", "LICENSE", "detrcli", "zoo")


@dataclass(frozen=True)
class Environment:
    """A virtual environment, to run commands in."""

    folder: Path

    def run(self, program: str, *args: object, cwd: Path, **settings: str) -> str:
        """What a program of the environment (`detr`, `python`) prints; it must succeed, and sees nothing of the checkout."""
        hidden = ("PYTHONPATH", "DETR_PLUGINS")
        env = {key: value for key, value in os.environ.items() if key not in hidden}
        command = [str(self.folder / "bin" / program), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, env=env | settings, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def detr(self, *args: str, cwd: Path, **settings: str) -> str:
        """The same of its `detr`, in a process that has torch already: what of detrcli is loaded is the environment's."""
        [site] = self.folder.glob("lib/python*/site-packages")
        done = detr(*args, cwd=cwd, env={"PYTHONPATH": str(site), **settings})
        assert done.code == 0, f"detr {' '.join(args)}\n{done.out}{done.err}"
        return done.out


def environment(folder: Path, package: Path) -> Environment:
    """A new environment with detrcli and `package`. What others make (torch …) is shared with the environment of the tests,
    through a path file; detrcli itself is not, whether it is installed there or linked to the checkout."""
    core = folder / "source"
    for name in OURS:
        source, target = ROOT / name, core / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            core.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    place = folder / "env"
    venv.create(place, symlinks=True)
    [site] = place.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("site-packages")))
    pip = (sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet")
    for source in (core, package):
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check")
        subprocess.run([*pip, *options, str(source)], check=True)
    return Environment(place)
