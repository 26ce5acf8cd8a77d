"""Which implementation answers: the native wheel where it can, plain torch everywhere else, and the reason for it.

`DETR_OPS` sets the mode for a process, `use` for a block of code, `form=` for one call:

    auto       native where the wheel has kernels for the device, else reference
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


class Wheel(NamedTuple):
    """What became of looking for the native wheel: its version, or why it cannot be used; per device."""

    cpu: str | None
    cuda: str | None
    reason: str


def find_wheel() -> Wheel:
    """Look for the wheel by its metadata: a checkout's bare folder `detrcli_ops` would answer to `import detrcli_ops`."""
    try:
        version = importlib.metadata.version("detrcli-ops")
    except importlib.metadata.PackageNotFoundError:
        return Wheel(None, None, "detrcli-ops is not installed (pip install detrcli-ops)")
    try:
        importlib.import_module("detrcli_ops._C")
    except (ImportError, OSError, RuntimeError) as error:
        return Wheel(None, None, f"detrcli-ops {version} does not load: {' '.join(str(error).split())}")
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("detrcli_ops::msda", "CUDA")
    return Wheel(version, version if has_cuda else None, f"detrcli-ops {version}")


# Looked up once, at import: a traced graph must not contain the search.
wheel = find_wheel()
if wheel.cpu is None:
    logger.info("deformable attention runs in plain torch: %s", wheel.reason)
_mode = os.environ.get("DETR_OPS", "auto").lower()


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


def backend(device: torch.device | str, form: Mode | None = None) -> Backend:
    """What answers on this device, and why."""
    mode = checked_mode(_mode if form is None else form)
    if mode == "reference" or mode == "gather":
        return Backend(mode, "asked for")
    reason = missing(torch.device(device).type)
    if reason is None:
        return Backend("native", wheel.reason)
    if mode == "native":
        raise DetrError(
            f"no native operators for {torch.device(device).type}: {reason}",
            hint="install or rebuild detrcli-ops, or set DETR_OPS=auto",
        )
    return Backend("reference", reason)


def missing(kind: str) -> str | None:
    """Why the wheel cannot serve this kind of device; None when it can."""
    if wheel.cpu is None:
        return wheel.reason
    if kind == "cpu":
        return None
    if kind == "cuda":
        return None if wheel.cuda else f"{wheel.reason} was built without CUDA"
    return f"{wheel.reason} has no kernels for {kind}"
