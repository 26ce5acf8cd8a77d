"""Running a trained model: which device, which precision, no gradients. `speed` makes it fast."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from detrcli.errors import NonFiniteError, UsageError
from detrcli.types import Detections, Output


def choose_device(name: str | None = None) -> torch.device:
    """The named device, else `DETR_DEVICE`, else the fastest there is."""
    name = name or os.environ.get("DETR_DEVICE")
    if not name or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used: {reason}",
            hint="known here: detr env; --device cpu always works",
        ) from None
    return device


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor, mask: Tensor | None, *, amp: bool = False) -> Output:
    """The model's answer in float32. `mask` None means that nothing is padded; `amp` computes in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        output: Output = model(images, mask)
    return _to_float(output) if amp else output


def refuse_non_finite(answer: Detections, picture: str) -> None:
    """NaN is less than no threshold: a diverged model would seem to find nothing."""
    if not (answer.scores.isfinite().all() and answer.boxes.isfinite().all()):
        raise NonFiniteError(
            f"the model's answer for {picture} is NaN or infinite",
            hint="the training has diverged (lower the rate), or 16 bits were too few (leave --amp out)",
        )


def _to_float(value: Any) -> Any:
    if isinstance(value, Output):
        return replace(value, **{f.name: _to_float(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_to_float(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_float(item) for key, item in value.items()}
    return value
