"""Which implementation answers: the native wheel where it can, plain torch everywhere else, and the reason for it.

`DETR_OPS` sets the mode for a process, `use` for a block of code, `form=` for one call:

    auto       native where the wheel has kernels for the device and the sizes, else reference
    native     native, or an error that says what is missing
    reference  plain torch with grid_sample
    gather     plain torch with indexing only (export targets without a reliable GridSample)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, cast

import torch

from detrcli.errors import DetrError, unknown

Form = Literal["native", "reference", "gather"]
Mode = Literal["auto", "native", "reference", "gather"]
MODES: Final = ("auto", "native", "reference", "gather")

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """What answers on a device, and why."""

    name: Form
    reason: str


class Sizes(NamedTuple):
    """What a device's kernels may have limits for."""

    pictures: int
    heads: int
    channels: int  # of a head
    levels: int


# what CMakeLists.txt compiles for, and what csrc/cuda/operators.cu refuses
CAPABILITY: Final = 8
MOST_ON_CUDA: Final = Sizes(pictures=65535, heads=65535, channels=256, levels=32)


class Wheel(NamedTuple):
    """What became of looking for the native wheel: its version, or why it cannot be used; per device."""

    cpu: str | None
    cuda: str | None
    reason: str
    without_cuda: str = "was built without CUDA"


def find_wheel() -> Wheel:
    """Look for the wheel by its metadata: a checkout's bare folder `detrcli_ops` would answer to `import detrcli_ops`."""
    try:
        version = importlib.metadata.version("detrcli-ops")
    except importlib.metadata.PackageNotFoundError:
        return Wheel(None, None, "detrcli-ops is not installed (pip install detrcli-ops)")
    try:
        without_cuda: str | None = importlib.import_module("detrcli_ops._C").WITHOUT_CUDA
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        return Wheel(None, None, f"detrcli-ops {version} does not load: {' '.join(str(error).split())}")
    found = Wheel(version, version, f"detrcli-ops {version}")
    return found if without_cuda is None else found._replace(cuda=None, without_cuda=without_cuda)


# Looked up once, at import: a traced graph must not contain the search.
wheel = find_wheel()
if wheel.cpu is None:
    logger.info("deformable attention runs in plain torch: %s", wheel.reason)
_mode = (os.environ.get("DETR_OPS") or "auto").lower()
_calls: list[str] | None = None


def checked_mode(mode: str) -> Mode:
    if mode not in MODES:
        raise unknown("value of DETR_OPS", mode, MODES)
    return cast(Mode, mode)


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Answer with `mode` inside the block, for the whole process."""
    global _mode
    before, _mode = _mode, checked_mode(mode)
    try:
        yield
    finally:
        _mode = before


@contextmanager
def watched() -> Iterator[list[str]]:
    """The kinds of devices of the calls inside the block, for the whole process: empty where no operator was called."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def backend(device: torch.device | str, form: Mode | None = None, sizes: Sizes | None = None) -> Backend:
    """What answers on this device, calls of these sizes, and why."""
    if _calls is not None:
        _calls.append(torch.device(device).type)
    mode = checked_mode(_mode if form is None else form)
    if mode == "reference" or mode == "gather":
        return Backend(mode, "asked for")
    reason = missing(device, sizes)
    if reason is None:
        return Backend("native", wheel.reason)
    if mode == "native":
        raise DetrError(
            f"no native operators for {torch.device(device).type}: {reason}",
            hint="set DETR_OPS=auto, or install or rebuild detrcli-ops",
        )
    return Backend("reference", reason)


def missing(device: torch.device | str, sizes: Sizes | None = None) -> str | None:
    """Why the wheel cannot serve this device, or calls of these sizes on it; None when it can."""
    device = torch.device(device)
    if wheel.cpu is None:
        return wheel.reason
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"{wheel.reason} has no kernels for {device.type}"
    if wheel.cuda is None:
        return f"{wheel.reason} {wheel.without_cuda}"
    gpu = torch.cuda.get_device_properties(device)  # a compiled graph holds what this answers
    if gpu.major < CAPABILITY:
        found = f"{gpu.name} has {gpu.major}.{gpu.minor}"
        return f"{wheel.reason} needs compute capability {CAPABILITY}.0; {found}"
    return beyond(sizes) if sizes is not None else None


def beyond(sizes: Sizes) -> str | None:
    """Which size is more than the CUDA kernels take."""
    for name, size, most in zip(Sizes._fields, sizes, MOST_ON_CUDA, strict=True):
        if size > most:
            return f"{wheel.reason} takes at most {most} {name} on CUDA, not {size}"
    return None
