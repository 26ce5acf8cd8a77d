"""Parts of a model that are not trained, or not kept in memory: freezing and gradient checkpointing, for any paper.

Both go by the roles that a family declares for its modules (`Family.parts`), so no paper needs code for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detrcli.errors import UsageError, nearest
from detrcli.nn.backbone import Backbone
from detrcli.nn.swin import SwinBody
from detrcli.plugins import Model


def freeze(net: nn.Module, model: Model, names: Sequence[str]) -> int:
    """Stop the learning of parts (`backbone`, `encoder`, …) or of parameters whose name matches a pattern; how many numbers."""
    frozen = 0
    for name in names:
        found = [p for path, p in net.named_parameters() if _is_meant(path, name, model)]
        if not found:
            parts = list(map(str, model.family.parts))
            meant = "".join(f"did you mean {near!r}? " for near in nearest(name, parts, 1))
            example = next(path for path, _ in net.named_parameters())
            raise UsageError(
                f"--freeze {name}: {model.name} has no such part or parameter",
                hint=f"{meant}parts: {', '.join(parts)}; or a pattern of parameter names, such as {example}",
            )
        frozen += sum(p.numel() for p in found if p.requires_grad)
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in net.parameters()):
        raise UsageError(f"--freeze {' '.join(names)} leaves nothing to train", hint="freeze less")
    return frozen


def _is_meant(path: str, name: str, model: Model) -> bool:
    parts: dict[str, Sequence[str]] = dict(model.family.parts)  # type: ignore[arg-type]
    if name in parts:
        return any(path == prefix or path.startswith(prefix + ".") for prefix in parts[name])
    try:
        return re.search(name, path) is not None
    except re.error as error:
        raise UsageError(f"--freeze {name}: {error}", hint="a part, or a regular expression") from error


@dataclass(slots=True)
class _Recomputed:
    """Stands for a module's forward: while training, what it kept for the backward pass is computed again there."""

    module: nn.Module
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.module.training and torch.is_grad_enabled():
            kept = [
                list(a) if isinstance(a, list) else a for a in args
            ]  # the caller's own may grow before then
            return checkpoint(self.forward, *kept, use_reentrant=False, **kwargs)
        return self.forward(*args, **kwargs)


def recompute(net: nn.Module, model: Model) -> int:
    """Checkpoint every layer of encoder and decoder and every stage of the backbone; how many there are."""
    roles: dict[str, Sequence[str]] = dict(model.family.parts)  # type: ignore[arg-type]
    paths = [*roles.get("encoder", ()), *roles.get("decoder", ())]
    modules = dict(net.named_modules())  # a path may also lead to a parameter
    layers = [layer for path in paths if path in modules for layer in _repeated(modules[path])]
    layers += [stage for m in net.modules() if isinstance(m, Backbone) for stage in _stages(m)]
    for layer in layers:
        setattr(layer, "forward", _Recomputed(layer, layer.forward))  # noqa: B010  # mypy: a method is no attribute
    return len(layers)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers: what stands in a ModuleList, never one inside another."""
    if isinstance(module, nn.ModuleList):
        yield from (layer for layer in module if _learns(layer) and any(layer.children()))
        return
    for child in module.children():
        yield from _repeated(child)


def _stages(backbone: Backbone) -> Iterator[nn.Module]:
    body = backbone.body.maps if isinstance(backbone.body, SwinBody) else backbone.body
    return (stage for stage in body.children() if _learns(stage))


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
