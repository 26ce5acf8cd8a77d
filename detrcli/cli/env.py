"""`detr env`: what a bug report needs, and why things are as they are."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

PACKAGES = (
    "detrcli", "detrcli-ops", "torch", "torchvision", "timm", "numpy", "scipy", "pillow", "pycocotools", "safetensors",
    "huggingface-hub", "typer", "rich", "onnx", "onnxscript", "onnxruntime", "openvino",
)  # fmt: skip


def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show versions, devices, kernels, caches and plugins, and why each is as it is."""
    from detrcli.cli import console

    console.settings.json = as_json
    facts = collect()
    if as_json:
        console.emit_json(facts)
        return
    for section, rows in facts.items():
        console.say(f"{section}:")
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            console.say(f"  {name:<{width}}  {value}")


def collect() -> dict[str, dict[str, Any]]:
    return {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
        },
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
    import torch

    from detrcli.nn.speed import describe

    facts = describe()
    if platform.machine() in ("x86_64", "AMD64"):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        facts["bf16 on the CPU"] = "in hardware" if native else "emulated: --amp is slower than without"
    return facts


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
