"""Layers of a trained network as oneDNN computes them on the CPU: bias, ReLU and residual sum in one pass with the products.

By themselves torch's linear layers copy the bias to where the products go, and each ReLU and each sum of a residual block
reads and writes its map once more. Where oneDNN cannot take a layer (another device or type, a gradient asked for, a graph
being traced), the layer computes itself as before.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
from timm.models import FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from detrcli.nn.layers import LinearReLU

After: TypeAlias = tuple[str, list[float], str]  # what oneDNN does to the products, as torch names it

NOTHING: After = ("none", [], "")
# A slope that nobody can see: of NaN the ReLU of oneDNN makes 0, and a diverged network would seem to find nothing.
RELU: After = ("leaky_relu", [1e-20], "")


def ask_onednn(model: nn.Module) -> None:
    """Hand the layers of the model over, in place."""
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is not None and not _is_odd(module):
            module.__class__ = kind
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            _join_sums(module)
        if isinstance(module, (nn.Sequential, FeatureListNet)):  # children are called in their order
            _join_relus(module)


class Linear(nn.Linear):
    after: After = NOTHING

    def forward(self, input: Tensor) -> Tensor:
        operands = _operands(self, input)
        if operands is None:
            return _itself(super().forward(input), self.after)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(*operands, *self.after)
        return out


class RectifiedLinear(Linear):
    after = RELU


class Conv2d(nn.Conv2d):
    after: After = NOTHING

    def forward(self, input: Tensor) -> Tensor:
        operands = _operands(self, input) if input.dim() == 4 else None  # (C, H, W) is allowed
        if operands is None:
            return _itself(super().forward(input), self.after)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(*operands, *self._geometry(), *self.after)
        return out

    def added_to(self, shortcut: Tensor, input: Tensor) -> Tensor:
        """shortcut + convolution, in the memory of the shortcut."""
        operands = _operands(self, input)
        if operands is None or operands[0].dtype != shortcut.dtype:
            return super().forward(input) + shortcut
        added = torch.ops.mkldnn._convolution_pointwise_.binary
        out: Tensor = added(shortcut, *operands, *self._geometry(), "add", 1.0, None, [], None)
        return out

    def _geometry(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    LinearReLU: RectifiedLinear,
    nn.Conv2d: Conv2d,
}


def _is_odd(module: nn.Module) -> bool:
    """Whether it is a convolution that pads with something else than a given number of zeros."""
    return isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str)
    )


class Residual(nn.Module):
    """A block of a ResNet whose norms are folded: relu(shortcut + conv(... relu(conv(x))))."""

    def __init__(self, block: BasicBlock | Bottleneck, convolutions: dict[str, Conv2d]) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
        self.downsample = block.downsample
        self._order = list(convolutions.values())

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        *first, last = self._order
        for convolution in first:
            x = convolution(x)
        return _rectify(last.added_to(shortcut, x))


def _join_sums(stage: nn.Sequential) -> None:
    """Make the blocks of a stage `Residual` where the shortcut is nobody else's: made by the block, or by the block before."""
    follows = False
    for name, block in stage.named_children():
        if not isinstance(block, (BasicBlock, Bottleneck)):
            follows = False
            continue
        convolutions = _convolutions(block)
        if convolutions is not None and (follows or block.downsample is not None):
            for convolution in list(convolutions.values())[:-1]:
                convolution.after = RELU
            setattr(stage, name, Residual(block, convolutions))
        follows = True


def _convolutions(block: nn.Module) -> dict[str, Conv2d] | None:
    """The convolutions of a block in their order, or None where it does more than convolve, rectify and add."""
    children = {name: child for name, child in block.named_children() if name != "downsample"}
    convolutions = {name: child for name, child in children.items() if isinstance(child, Conv2d)}
    others = [child for name, child in children.items() if name not in convolutions]
    plain = all(type(child) in (nn.Identity, nn.ReLU) for child in others)
    complete = len(convolutions) == sum(type(child) is nn.ReLU for child in others)
    return convolutions if plain and complete else None


def _join_relus(parent: nn.Module) -> None:
    """In a module that calls its children in their order: a ReLU behind a layer becomes a part of it."""
    before: nn.Module | None = None
    for name, child in parent.named_children():
        if type(child) is nn.ReLU and isinstance(before, (Linear, Conv2d)):
            before.after = RELU
            setattr(parent, name, nn.Identity())
        if type(child) is not nn.Identity:
            before = child


def _operands(layer: nn.Linear | nn.Conv2d, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Input, weight and bias in the type to compute in; None where the layer must compute itself."""
    lowered = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if lowered else input.dtype
    if dtype not in _types() or not input.is_cpu or not input.numel() or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and (input.requires_grad or layer.weight.requires_grad):
        return None
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return input.to(dtype), layer.weight.to(dtype), bias


@functools.cache
def _types() -> tuple[torch.dtype, ...]:
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)


def _itself(out: Tensor, after: After) -> Tensor:
    return out if after is NOTHING else out.relu_()


def _rectify(x: Tensor) -> Tensor:
    """ReLU in place. torch takes fourteen times as long for bfloat16 as for integers, which are in the same order: all
    negative numbers are below -127, where NaN begins."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or x.requires_grad:
        return x.relu_()
    torch.threshold_(x.view(torch.int16), -128, 0)
    return x
