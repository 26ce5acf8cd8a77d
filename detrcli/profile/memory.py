"""How much memory activations take, found on the meta device; and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detrcli.errors import UsageError
from detrcli.profile.counting import pictures, whole_attention

STATES = 4  # of a trained parameter: value, gradient and Adam's two moments


def saved_for_backward(model: nn.Module, batch: int, size: tuple[int, int]) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters not counted; the model is on the meta device."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage] = storage.nbytes()
        return tensor

    with whole_attention(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(*pictures(batch, size))
        total = sum(kept.values())
        del output
    return total


def trained(model: nn.Module) -> int:
    """Bytes of the parameters and, of those that learn, gradient and Adam's moments."""
    return sum(p.numel() * p.element_size() * (STATES if p.requires_grad else 1) for p in model.parameters())


def available(device: torch.device) -> int | None:
    """Bytes that are free; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    said = _meminfo().get("MemAvailable")
    return None if said is None else said * 1024


def _meminfo() -> Mapping[str, int]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1}


def refuse_if_too_large(needs: int, device: torch.device, what: Sequence[str]) -> None:
    """Before anything is allocated: a machine that swaps or is killed measures nothing."""
    free = available(device)
    if free is not None and needs > free:
        raise UsageError(
            f"{' and '.join(what)} would need about {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}",
            hint="take a smaller --size or --batch; counting alone (without --latency) needs no memory",
        )
