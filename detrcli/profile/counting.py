"""What one forward pass costs, counted on the meta device: shapes flow, nothing is computed, nothing allocated.

An operator's answer and cost depend only on the shapes it is given, so both are remembered: layers of one kind, sizes that
share a map and models that share a backbone are worked out once.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from detrcli.profile.formulas import Extra, formula_of
from detrcli.profile.parts import Running

SAMPLED = "projection"  # the part whose maps are the model's scales


@dataclass(slots=True)
class Counts:
    """Sums over one forward pass or several; `macs` by (part, operator), `moved` the bytes that operators read and write."""

    macs: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    moved: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    unknown: Counter[str] = field(default_factory=Counter)  # calls that nobody can count
    scales: list[tuple[int, int]] = field(
        default_factory=list
    )  # of the maps the transformer works on, finest first
    queries: dict[str, int] = field(default_factory=dict)  # by part, of those that sample maps
    peak: int = 0  # bytes of activations alive at once

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


def count(
    model: nn.Module,
    parts: Mapping[Any, Sequence[str]],
    batch: int,
    size: tuple[int, int],
    extra: frozenset[Extra] = frozenset(),
) -> Counts:
    """One forward pass over `batch` pictures of (height, width); the model is on the meta device."""
    counts = Counts()
    with ExitStack() as stack:
        stack.enter_context(whole_attention())
        running = stack.enter_context(
            Running(model, parts, left=lambda part, out: _note_scales(counts, part, out))
        )
        stack.enter_context(torch.inference_mode())  # with gradients torch takes attention apart unseen
        stack.enter_context(_Counter(counts, running, extra))
        model(*pictures(batch, size))
    return counts


def pictures(batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and their empty padding mask, without memory."""
    return (
        torch.empty(batch, 3, *size, device="meta"),
        torch.zeros(batch, *size, dtype=torch.bool, device="meta"),
    )


@contextmanager
def whole_attention() -> Iterator[None]:
    """Without torch's fused attention layer, which hides its products from every counter."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _note_scales(counts: Counts, part: str, output: Any) -> None:
    if part == SAMPLED:
        maps = output if isinstance(output, (list, tuple)) else [output]
        sizes = {(m.shape[-2], m.shape[-1]) for m in maps if isinstance(m, Tensor) and m.dim() == 4}
        counts.scales = sorted({*counts.scales, *sizes}, key=lambda s: -s[0] * s[1])


@dataclass(frozen=True, slots=True)
class _Call:
    """What is remembered of an operator for given shapes."""

    outs: tuple[tuple[Any, Any, torch.dtype], ...]  # shape, strides, dtype of each answer
    single: bool
    macs: float | None  # None: nobody knows
    moved: int

    def answer(self) -> Any:
        made = [
            torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            for shape, strides, dtype in self.outs
        ]
        return made[0] if self.single else tuple(made)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    known: dict[Any, _Call] = {}  # noqa: RUF012  shared by all passes of the process: that is its use

    def __init__(self, counts: Counts, running: Running, extra: frozenset[Extra]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.running, self.extra = counts, running, extra
        self.alive = 0
        self.in_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket is torch.ops.aten.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        if _comes_apart(func, self.extra):
            with self:
                return func.decompose(*args, **kwargs)
        if not _makes_anew(func):
            return func(*args, **kwargs)
        key = (func, _signature(args), _signature(tuple(kwargs.items())), self.extra)
        call = self.known.get(key)
        if call is None:
            call = self.known[key] = _call(func, args, kwargs, self.extra)
        return self._book(func, args, call)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Devices work in tiles, in little more memory than the answer's; on meta it is matrices of queries by keys."""
        self.in_attention = True
        try:
            with self:
                answer = func.decompose(*args, **kwargs)
        finally:
            self.in_attention = False
        self._track(answer)
        return answer

    def _book(self, func: Any, args: Any, call: _Call) -> Any:
        part, name = self.running.part, str(func._overloadpacket)
        if call.macs is None:
            self.counts.unknown[name] += 1
        elif call.macs:
            self.counts.macs[part, name] += call.macs
        self.counts.moved[part] += call.moved
        if func._overloadpacket is torch.ops.aten.grid_sampler_2d:
            queries = args[1].shape[2]  # of places (N, P, Q, 2)
            self.counts.queries[part] = max(self.counts.queries.get(part, 0), queries)
        answer = call.answer()
        if not self.in_attention:
            for tensor in answer if isinstance(answer, tuple) else (answer,):
                self._track(tensor)
        return answer

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive += storage.nbytes()
        self.counts.peak = max(self.counts.peak, self.alive)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.alive -= size


@functools.cache
def _makes_anew(func: Any) -> bool:
    """Whether the answer is new memory: no view, nothing written in place, nothing but tensors."""
    returns = func._schema.returns
    return not func._schema.is_mutable and all(
        r.alias_info is None and str(r.type) == "Tensor" for r in returns
    )


@functools.cache
def _comes_apart(func: Any, extra: frozenset[Extra]) -> bool:
    """Whether torch writes the operator in terms of others, which are then what counts."""
    if formula_of(func._overloadpacket, extra) is not None:
        return False
    return bool(func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def _call(func: Any, args: Any, kwargs: Any, extra: frozenset[Extra]) -> _Call:
    packet = func._overloadpacket
    out = _sampled(*args[:2]) if packet is torch.ops.aten.grid_sampler_2d else func(*args, **kwargs)
    outs = out if isinstance(out, tuple) else (out,)
    formula = formula_of(packet, extra)
    foreign = func.namespace not in ("aten", "prim", "prims")
    return _Call(
        outs=tuple((o.shape, o.stride(), o.dtype) for o in outs),
        single=not isinstance(out, tuple),
        macs=formula(args, kwargs, out) if formula else None if foreign else 0.0,
        moved=sum(t.numel() * t.element_size() for t in (*_tensors(args), *outs)),
    )


def _sampled(image: Tensor, grid: Tensor) -> Tensor:
    """The empty answer of grid_sample; torch finds its shape by tracing the whole interpolation, which takes most of the time."""
    return image.new_empty((*image.shape[:2], *grid.shape[1:3]))


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    return value
