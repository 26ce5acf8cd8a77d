"""Running a trained model faster without changing its answers: five levers, all on unless `DETR_FAST` says otherwise.

    fold        a frozen norm behind a convolution becomes part of it
    layout      convolutions keep their weights channels-last, the order that oneDNN and cuDNN compute in
    onednn      on the CPU oneDNN computes all layers, and adds biases, rectifies and sums while it is at it
    allocator   freed memory stays in the process (CPU, glibc): else every large intermediate is made of fresh pages,
                which the system clears one by one
    threads     no more of them than processors that the process may use (CPU), which torch does not ask a container

`DETR_FAST=off` is plain PyTorch, `DETR_FAST=fold,layout` picks; `detr env` shows what is in use.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import platform
from itertools import chain, pairwise
from typing import Literal, get_args

import torch
from torch import nn

from detrcli.errors import unknown
from detrcli.nn.layers import FrozenBatchNorm2d
from detrcli.nn.onednn import ask_onednn
from detrcli.processors import processors

Lever = Literal["fold", "layout", "onednn", "allocator", "threads"]
LEVERS: tuple[Lever, ...] = get_args(Lever)

# glibc's mallopt: never map a block of its own, never give memory back, grow by 64 MiB
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 64 << 20)}


def levers() -> frozenset[Lever]:
    """Those in use: all, or what `DETR_FAST` names."""
    asked = os.environ.get("DETR_FAST", "").strip().lower()
    if asked in ("", "on", "auto"):
        return frozenset(LEVERS)
    names = [] if asked in ("off", "none") else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in LEVERS:
            raise unknown("value of DETR_FAST", name, (*LEVERS, "off"))
    return frozenset(lever for lever in LEVERS if lever in names)


def fastest(model: nn.Module) -> nn.Module:
    """The model for inference, in eval mode: it answers the same up to rounding, and shares what did not need to change.

    The model given stays as it is, to be trained on or saved.
    """
    chosen = levers()
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    if any(tensor.device.type == "cpu" for tensor in shared.values()):
        if "allocator" in chosen:
            keep_memory()
        threads()
    model = copy.deepcopy(model, shared).eval()
    if "fold" in chosen:
        fold_frozen_norms(model)
    if "layout" in chosen:
        order_channels_last(model)
    if "onednn" in chosen and has_onednn():
        ask_onednn(model)
    return model


def fold_frozen_norms(model: nn.Module) -> None:
    """Make each frozen norm part of the convolution that its parent holds just before it."""
    for parent in model.modules():
        for (before, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(norm, FrozenBatchNorm2d) and isinstance(conv, nn.Conv2d):
                setattr(parent, before, fold(conv, norm))
                setattr(parent, name, nn.Identity())


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> nn.Conv2d:
    """scale * (W x + b) + shift, as one convolution."""
    scale, shift = norm.scale_and_shift()
    folded = copy.copy(conv)
    folded._parameters = dict(conv._parameters)
    bias = shift if conv.bias is None else shift + scale * conv.bias
    folded.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return folded


@torch.no_grad()
def order_channels_last(model: nn.Module) -> None:
    """Feature maps follow the order of the weights, so the pictures need not be reordered."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            ordered = module.weight.contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(ordered, requires_grad=module.weight.requires_grad)


def has_onednn() -> bool:
    """Whether torch has it, on x86: elsewhere nobody has seen what it makes of sums and ReLUs behind products."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and platform.machine() in ("x86_64", "AMD64")


@functools.cache
def keep_memory() -> bool:
    """Tell the C library to keep freed memory, for the rest of the process; False where it is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) for option, value in _MALLOPT.values()]
    return all(taken)


def threads() -> int:
    """Those that inference takes."""
    return choose_threads() if "threads" in levers() else torch.get_num_threads()


def choose_threads(workers: int = 0) -> int:
    """Share the processors between the ranks of this machine and the workers of each, unless `OMP_NUM_THREADS` decides."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        most = max(1, processors() // ranks - workers)
        if torch.get_num_threads() > most:
            torch.set_num_threads(most)
    return torch.get_num_threads()


def describe() -> dict[str, str]:
    """Each lever, in use or not, and why; for `detr env`."""
    chosen = levers()
    states: dict[str, str] = {lever: "on" if lever in chosen else "off (DETR_FAST)" for lever in LEVERS}
    if "allocator" in chosen and platform.libc_ver()[0] != "glibc":
        states["allocator"] = "off (needs glibc)"
    if "onednn" in chosen and not has_onednn():
        states["onednn"] = "off (not in this torch, or not tried on such a processor)"
    return states
