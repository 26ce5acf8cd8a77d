"""Which part of a model is running: the innermost module that the family's table of parts names, layers by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

OTHER = "other"  # what belongs to no declared part
LAYERS = ("layers", "blocks")  # lists whose members are told apart


class Running:
    """While it is open, `part` names what runs; `left(label, output)` hears of every module of a part that is done, and
    `switched()` of every change, before it happens."""

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[Any, Sequence[str]],
        *,
        left: Callable[[str, Any], None] = lambda label, output: None,
        switched: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.left, self.switched = model, left, switched
        self.owners = {path: str(name) for name, paths in parts.items() for path in paths}
        self.stack: list[str] = [OTHER]
        self.handles: list[Any] = []

    @property
    def part(self) -> str:
        return self.stack[-1]

    def __enter__(self) -> Running:
        for path, module in self.model.named_modules():
            label = self._label(path)
            if label is not None and (self._begins(path, label) or self._in_a_list(path)):
                self.handles.append(
                    module.register_forward_pre_hook(lambda m, a, name=label: self._enter(name))
                )
                self.handles.append(module.register_forward_hook(lambda m, a, out: self._leave(out)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, label: str) -> None:
        self.switched()
        self.stack.append(label)

    def _leave(self, output: Any) -> None:
        self.switched()
        self.left(self.stack.pop(), output)

    def _begins(self, path: str, label: str) -> bool:
        return label != self._label(path.rpartition(".")[0])

    def _in_a_list(self, path: str) -> bool:
        """Lists of modules are never called themselves, only what they hold."""
        return isinstance(self.model.get_submodule(path.rpartition(".")[0]), (nn.ModuleList, nn.ModuleDict))

    def _label(self, path: str) -> str | None:
        """The part that names this module or one that holds it; its layers by number, `encoder.2`."""
        owners = [owner for owner in self.owners if path == owner or path.startswith(f"{owner}.")]
        if not owners:
            return None
        owner = max(owners, key=len)
        inside = path.removeprefix(owner).strip(".").split(".")
        layer = inside[1] if inside[0] in LAYERS and len(inside) > 1 else ""
        return f"{self.owners[owner]}.{layer}" if layer else self.owners[owner]


def in_order(by_part: Mapping[str, float], declared: Sequence[str]) -> dict[str, float]:
    """Parts in declared order, each followed by its layers; a part's own figure includes theirs."""
    ordered: dict[str, float] = {}
    for part in (*declared, OTHER):
        layers = {k: v for k, v in by_part.items() if k.startswith(f"{part}.")}
        whole = by_part.get(part, 0.0) + sum(layers.values())
        if whole:
            ordered[part] = whole
            ordered |= dict(sorted(layers.items(), key=lambda item: int(item[0].rsplit(".", 1)[1])))
    return ordered
