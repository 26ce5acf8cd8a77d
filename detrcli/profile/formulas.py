"""How many multiply-adds an operator takes, from its arguments and its answer.

Convention of the papers: one multiply-add counts once, and only what multiplies matrices or samples maps counts
(convolutions, linear layers, attention products, bilinear sampling). `torch`'s own formulas give two operations a
multiply-add, so they are halved; what it leaves out has a formula here. `EXTRA` holds what some counters add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
import torchvision  # noqa: F401  registers its operators
from torch.utils.flop_counter import flop_registry

from detrcli.errors import unknown
from detrcli.ops.dispatch import wheel

BILINEAR = 4  # multiply-adds for one bilinear sample: one a corner

Formula = Callable[[tuple[Any, ...], Mapping[str, Any], Any], float]
Extra = Literal["norms", "softmax"]
aten = torch.ops.aten


def formula_of(packet: Any, extra: frozenset[Extra]) -> Formula | None:
    """What is known of an operator; None: it does not count, or nobody knows."""
    if packet in FORMULAS:
        return FORMULAS[packet]
    if packet in flop_registry:
        torchs = flop_registry[packet]
        return lambda args, kwargs, out: torchs(*args, **kwargs, out_val=out) / 2
    for name in extra:
        if packet in EXTRA[name]:
            return EXTRA[name][packet]
    return None


def _grid_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    return float(BILINEAR * out.numel())


def _roi_align(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """Each cell of the answer averages a grid of samples; without a fixed grid torchvision chooses one a box, taken as 2 x 2."""
    ratio = args[5] if len(args) > 5 and args[5] > 0 else 2
    return float(BILINEAR * ratio * ratio * out.numel())


def _deform_conv(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """The convolution of the samples, the samples, and their modulation."""
    out_channels, in_channels, *kernel = args[1].shape
    groups = args[11] if len(args) > 11 else 1
    taps = out.numel() / out_channels * math.prod(kernel)
    return float(taps * in_channels * out_channels + taps * in_channels * groups * (BILINEAR + 1))


def _norm(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """Mean, variance, difference, scale and shift: five operations a value, as fvcore counts them."""
    return float(5 * args[0].numel())


def _softmax(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """Exponential, sum and division."""
    return float(3 * args[0].numel())


def _msda(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """One bilinear sample a channel, point and level; offsets or locations are (B, Q, M, L, P, 2)."""
    value, points = args[0], next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 6)
    return float(BILINEAR * points.numel() // 2 * value.shape[-1])


def _kda(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """Values are sampled, and keys where they are not the values."""
    return _msda((args[2], *args[3:]), kwargs, out) * (1 if args[1] is None else 2)


def _of_the_wheel() -> dict[Any, Formula]:
    """Our native operators; profiles run on the meta device, which they do not serve, but a paper may call them by name."""
    if wheel.cpu is None:
        return {}
    ours = torch.ops.detrcli_ops
    return {ours.msda: _msda, ours.msda_fused: _msda, ours.kda: _kda}


FORMULAS: dict[Any, Formula] = {
    aten.grid_sampler_2d: _grid_sample,
    torch.ops.torchvision.roi_align: _roi_align,
    torch.ops.torchvision.deform_conv2d: _deform_conv,
    **_of_the_wheel(),
}
EXTRA: dict[Extra, dict[Any, Formula]] = {
    "norms": {aten.native_layer_norm: _norm, aten.native_group_norm: _norm, aten.native_batch_norm: _norm},
    "softmax": {aten._softmax: _softmax, aten._safe_softmax: _softmax},
}


def extras(names: Collection[str]) -> frozenset[Extra]:
    for name in names:
        if name not in EXTRA:
            raise unknown("kind of operators", name, list(EXTRA))
    return frozenset(name for name in EXTRA if name in names)
