"""What the numbers of a machine depend on: versions, devices, kernels, and why each is as it is.

Nothing secret: no environment variable, no name of machine or user, and of the command line no password and no token.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "detrcli", "detrcli-ops", "torch", "torchvision", "timm", "numpy", "scipy", "pillow", "pycocotools", "safetensors",
    "huggingface-hub", "typer", "rich", "onnx", "onnxscript", "onnxruntime", "openvino",
)  # fmt: skip
_SECRETS = re.compile(r"(?<=://)[^/@\s]+(?=@)|\bhf_\w{8,}|(?<=token=)[^&\s]+", re.IGNORECASE)


def of_a_run() -> dict[str, Any]:
    """What a run records of where it ran: the facts of `detr env` without its places, the command, the project's commit."""
    import torch

    return {
        "command": command(sys.argv),
        "project": git_state(Path.cwd()),
        "system": _system() | {"torch threads": torch.get_num_threads()},
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "kernels": _kernels(),
        "speed": _speed(),
    }


def command(words: list[str]) -> str:
    """The command line as one would type it, without what may not be shown to others."""
    first = "detr" if Path(words[0]).stem in ("detr", "__main__") else words[0]
    return shlex.join(_SECRETS.sub("***", word) for word in [first, *words[1:]])


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that is checked out in the user's project, and whether its files differ from it; None outside of one.

    Only looked at: no lock is taken, the index is not refreshed, no hook is run.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def _git(folder: Path, *words: str) -> str | None:
    calm = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *calm, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=True,
        )
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # no git, no repository, one that git does not trust, too large
        return None
    return run.stdout.decode("utf-8", "replace")


def _system() -> dict[str, Any]:
    return {"python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count()}


def collect() -> dict[str, dict[str, Any]]:
    """What `detr env` shows."""
    return {
        "system": _system(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "kernels": _kernels(),
        "speed": _speed(),
        "places": _places(),
        "plugins": _plugins(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _kernels() -> dict[str, str]:
    """Which deformable attention each kind of device gets, with the reason."""
    import torch

    from detrcli.ops import backend

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = {kind: backend(torch.device(kind)) for kind in kinds}
    return {kind: f"{b.name} ({b.reason})" for kind, b in chosen.items()}


def _speed() -> dict[str, str]:
    """What makes inference faster, and whether 16 bits do on this CPU."""
    from detrcli.nn.speed import describe

    verdict = (
        "faster than float32" if bf16_speed() > 1 else "slower than float32: --amp saves memory, not time"
    )
    return {**describe(), "bf16 on the CPU": f"{verdict} (measured)"}


@functools.cache
def bf16_speed() -> float:
    """How many times float32's speed a matrix product has in bf16 on this CPU: tried, for processors that know it may be the slower."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        start = time.perf_counter()
        a @ b
        return time.perf_counter() - start

    turns = [(seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(5)]
    exact, short = (min(times) for times in zip(*turns, strict=True))
    return float(exact / short)


def _places() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from detrcli import files, runs

    return {
        "runs": str(runs.root("").absolute()),
        "own cache": str(files.home()),
        "weights from the Hub": HF_HUB_CACHE,
    }


def _plugins() -> dict[str, str]:
    from detrcli.plugins import Loaded, plugins

    return {
        state.found.name: f"{state.found.distribution} {state.found.version}, "
        + ("loaded" if isinstance(state, Loaded) else f"broken: {state.reason}")
        for state in plugins()
    }
