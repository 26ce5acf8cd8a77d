"""Counting multiply-adds by operator, on the meta device: shapes flow, nothing is computed.

Convention of the papers: one multiply-add counts once, and only what multiplies matrices or samples maps counts
(convolutions, linear layers, attention products, bilinear sampling); norms, activations and softmax do not.
`torch`'s own formulas give two operations a multiply-add, so they are halved; what it leaves out has a formula here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

OTHER = "other"  # what belongs to no declared part
BILINEAR = 4  # multiply-adds for one bilinear sample: one a corner

Formula = Callable[[tuple[Any, ...], Mapping[str, Any], Any], float]


@dataclass(slots=True)
class Counts:
    """Multiply-adds by part and operator, and the calls nobody could count."""

    macs: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))  # (part, operator)
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> float:
        return sum(self.macs.values())

    def by_part(self) -> dict[str, float]:
        return _summed((part, value) for (part, _), value in self.macs.items())

    def by_operator(self) -> dict[str, float]:
        return _summed((operator, value) for (_, operator), value in self.macs.items())


def _summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for name, value in pairs:
        found[name] += value
    return dict(found)


def count(model: nn.Module, parts: Mapping[Any, Sequence[str]], batch: int, size: tuple[int, int]) -> Counts:
    """The multiply-adds of one forward pass over `batch` pictures of (height, width); the model is on the meta device."""
    images = torch.empty(batch, 3, *size, device="meta")
    mask = torch.zeros(batch, *size, dtype=torch.bool, device="meta")
    counts = Counts()
    with _whole_attention(), _Where(model, parts) as where, torch.no_grad(), _Counter(counts, where):
        model(images, mask)
    return counts


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Without torch's fused attention layer, which hides its products from every counter."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Where:
    """The part that is running: the innermost module that a part names, also by layer ("encoder.layers.2")."""

    def __init__(self, model: nn.Module, parts: Mapping[Any, Sequence[str]]) -> None:
        self.stack: list[str] = [OTHER]
        self.names = {path: name for name, paths in parts.items() for path in paths}
        self.model = model
        self.handles: list[Any] = []

    def __enter__(self) -> _Where:
        for path, module in self.model.named_modules():
            label = self._label(path)
            if label is not None and (label != self._label(path.rpartition(".")[0]) or self._in_a_list(path)):
                self.handles.append(
                    module.register_forward_pre_hook(lambda m, a, label=label: self.stack.append(label))
                )
                self.handles.append(module.register_forward_hook(lambda m, a, out: self._leave()))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _leave(self) -> None:
        self.stack.pop()

    def _in_a_list(self, path: str) -> bool:
        """Lists of modules are never called themselves, only what they hold."""
        return isinstance(self.model.get_submodule(path.rpartition(".")[0]), (nn.ModuleList, nn.ModuleDict))

    def _label(self, path: str) -> str | None:
        """The part that names this module or one that holds it; its layers by number, `encoder.2`."""
        owners = [part for part in self.names if path == part or path.startswith(f"{part}.")]
        if not owners:
            return None
        owner = max(owners, key=len)
        inside = path.removeprefix(owner).strip(".").split(".")
        layer = inside[1] if inside[0] in ("layers", "blocks") and len(inside) > 1 else ""
        return f"{self.names[owner]}.{layer}" if layer else self.names[owner]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, counts: Counts, where: _Where) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.where = counts, where
        self.whole: set[Any] = set()  # operators that do not come apart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if (
            func.namespace == "aten"
            and func not in self.whole
            and packet not in flop_registry
            and packet not in FORMULAS
        ):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            self.whole.add(func)  # asking again takes as long as the call
        out = _sampled(*args[:2]) if packet is torch.ops.aten.grid_sampler_2d else func(*args, **kwargs)
        name = str(packet)
        if packet in FORMULAS:
            self.counts.macs[self.where.stack[-1], name] += FORMULAS[packet](args, kwargs, out)
        elif packet in flop_registry:
            self.counts.macs[self.where.stack[-1], name] += (
                flop_registry[packet](*args, **kwargs, out_val=out) / 2
            )
        elif func.namespace not in ("aten", "prim", "prims"):
            self.counts.unknown[name] += 1
        return out


def _sampled(image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The empty answer of grid_sample; torch finds its shape by tracing the whole interpolation, which takes most of the time."""
    return image.new_empty((*image.shape[:2], *grid.shape[1:3]))


def _grid_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    return float(BILINEAR * out.numel())


def _roi_align(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """Each cell of the answer averages a grid of samples; without a fixed grid torchvision chooses one a box, taken as 2 x 2."""
    ratio = args[5] if len(args) > 5 and args[5] > 0 else 2
    return float(BILINEAR * ratio * ratio * out.numel())


def _deform_conv(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
    """The convolution of the samples, the samples, and their modulation."""
    weight = args[1]
    out_channels, in_channels, *kernel = weight.shape
    places = out.numel() / out_channels
    taps = places * math.prod(kernel)
    groups = args[11] if len(args) > 11 else 1
    samples = taps * in_channels * groups
    return float(taps * in_channels * out_channels + samples * (BILINEAR + 1))


FORMULAS: dict[Any, Formula] = {torch.ops.aten.grid_sampler_2d: _grid_sample}


def _add_torchvision() -> None:
    import torchvision  # noqa: F401  registers its operators

    FORMULAS[torch.ops.torchvision.roi_align] = _roi_align
    FORMULAS[torch.ops.torchvision.deform_conv2d] = _deform_conv


_add_torchvision()
