"""From the names in somebody's weights file to ours and back: a map is a list of rules over name patterns, no code per paper.

    official = KeyMap((
        Drop("**.num_batches_tracked"),
        Rename("transformer.encoder.**", "encoder.**"),
        Fuse(("**.q_proj.*", "**.k_proj.*", "**.v_proj.*"), "**.in_proj_*"),
        Alias("class_embed.*.**", ("decoder.class_embed.*.**",)),
    ))

In a pattern `*` stands for anything without a dot and `**` for anything at all; the n-th one on the left is the n-th one on
the right, which is why every map runs in both directions. Rules apply in order, each to what the rules before it left, so a
map for one layout may continue another: `spellings | hub`.

No torch is imported until tensors are joined or split.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from detrcli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor on its way, with the names it had in the file."""

    tensor: Tensor
    origin: tuple[str, ...]


@dataclass(slots=True)
class Table:
    """Tensors by the names they have so far, and what became of those that are gone."""

    entries: dict[str, Entry]
    dropped: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)

    def put(self, name: str, entry: Entry) -> None:
        if name in self.entries:
            first = ", ".join(self.entries[name].origin)
            raise CheckpointError(
                f"two tensors of the file are the same one to us, {name}: {first} and {', '.join(entry.origin)}",
                hint="the file holds two models, or its layout is not one we know",
            )
        self.entries[name] = entry

    def take(self, name: str) -> Entry:
        return self.entries.pop(name)


@dataclass(frozen=True, slots=True)
class Rename:
    """Another name. With `back=False` it is a mere spelling that we read and never write."""

    foreign: str
    ours: str
    back: bool = True

    def __post_init__(self) -> None:
        _same_wildcards(self.foreign, self.ours)

    def forward(self, table: Table) -> None:
        _rename(table, self.foreign, self.ours)

    def backward(self, table: Table) -> None:
        if self.back:
            _rename(table, self.ours, self.foreign)


@dataclass(frozen=True, slots=True)
class Drop:
    """Names that carry nothing for us: counters, profilers' leftovers, heads of another task."""

    foreign: str

    def forward(self, table: Table) -> None:
        for name, _ in _matches(table, self.foreign):
            table.dropped.extend(table.take(name).origin)

    def backward(self, table: Table) -> None:
        """Nothing to bring back."""


@dataclass(frozen=True, slots=True)
class Fuse:
    """Tensors that we hold as one: joined along their rows, in this order."""

    foreign: tuple[str, ...]
    ours: str

    def __post_init__(self) -> None:
        for pattern in self.foreign:
            _same_wildcards(pattern, self.ours)

    def forward(self, table: Table) -> None:
        import torch

        for _, parts in _matches(table, self.foreign[0]):
            names = [_fill(pattern, parts) for pattern in self.foreign]
            if all(name in table.entries for name in names):  # else they are reported as unexpected
                entries = [table.take(name) for name in names]
                origin = tuple(name for entry in entries for name in entry.origin)
                table.put(_fill(self.ours, parts), Entry(torch.cat([e.tensor for e in entries]), origin))

    def backward(self, table: Table) -> None:
        for name, parts in _matches(table, self.ours):
            entry = table.take(name)
            for pattern, piece in zip(self.foreign, entry.tensor.chunk(len(self.foreign)), strict=True):
                table.put(_fill(pattern, parts), Entry(piece, entry.origin))


@dataclass(frozen=True, slots=True)
class Alias:
    """One tensor with several names, of which a file may hold any; those it holds must be equal."""

    name: str
    others: tuple[str, ...]

    def __post_init__(self) -> None:
        for other in self.others:
            _same_wildcards(other, self.name)

    def forward(self, table: Table) -> None:
        for pattern in self.others:
            for other, parts in _matches(table, pattern):
                name, entry = _fill(self.name, parts), table.take(other)
                known = table.entries.get(name)
                if known is None:
                    table.put(name, entry)
                elif not _equal(known.tensor, entry.tensor):
                    raise CheckpointError(
                        f"{known.origin[0]} and {entry.origin[0]} are one tensor in this model, but differ in the file",
                        hint="the file is of another variant, or damaged",
                    )
                else:
                    table.entries[name] = replace(known, origin=known.origin + entry.origin)

    def backward(self, table: Table) -> None:
        for name, parts in _matches(table, self.name):
            for pattern in self.others:
                table.put(_fill(pattern, parts), Entry(table.entries[name].tensor.clone(), (name,)))


@dataclass(frozen=True, slots=True)
class Fill:
    """Equal tensors of which a file may hold only the first: then the others are copies of it, all or none."""

    source: str
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        for target in self.targets:
            _same_wildcards(target, self.source)

    def forward(self, table: Table) -> None:
        for name, parts in _matches(table, self.source):
            targets = [_fill(pattern, parts) for pattern in self.targets]
            if not any(target in table.entries for target in targets):
                for target in targets:
                    table.put(target, replace(table.entries[name], tensor=table.entries[name].tensor.clone()))
                table.filled.extend(targets)

    def backward(self, table: Table) -> None:
        """A file with all of them is as good."""


Rule = Rename | Drop | Fuse | Alias | Fill


@dataclass(frozen=True, slots=True)
class KeyMap:
    rules: tuple[Rule, ...] = ()

    def __or__(self, after: KeyMap) -> KeyMap:
        """This map first, then the other."""
        return KeyMap(self.rules + after.rules)


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a map made of a file."""

    tensors: dict[str, Tensor]  # by our names
    origin: dict[str, tuple[str, ...]]  # our name -> the names in the file
    dropped: tuple[str, ...] = ()  # names of the file that a rule left out
    filled: tuple[str, ...] = ()  # our names that are copies of another tensor


def apply(keymap: KeyMap, tensors: Mapping[str, Tensor]) -> Mapped:
    """The tensors of a file by our names; what no rule knows keeps its name and is reported when it is loaded."""
    table = Table({name: Entry(tensor, (name,)) for name, tensor in tensors.items()})
    for rule in keymap.rules:
        rule.forward(table)
    return Mapped(
        {name: entry.tensor for name, entry in table.entries.items()},
        {name: entry.origin for name, entry in table.entries.items()},
        tuple(table.dropped),
        tuple(table.filled),
    )


def revert(keymap: KeyMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names of the map's layout, shared ones under every name they have there."""
    table = Table({name: Entry(tensor, (name,)) for name, tensor in tensors.items()})
    for rule in reversed(keymap.rules):
        rule.backward(table)
    return {name: entry.tensor for name, entry in table.entries.items()}


_WILDCARD = re.compile(r"\*\*?")


@functools.cache
def _compiled(pattern: str) -> Callable[[str], re.Match[str] | None]:
    tokens = re.split(r"(\*\*?)", pattern)
    expression = "".join({"*": r"([^.]+)", "**": r"(.+)"}.get(t, re.escape(t)) for t in tokens)
    return re.compile(expression).fullmatch


def _matches(table: Table, pattern: str) -> list[tuple[str, tuple[str, ...]]]:
    """The names that fit the pattern now, each with what its wildcards stand for."""
    fits = _compiled(pattern)
    return [(name, match.groups()) for name in table.entries if (match := fits(name))]


def _fill(pattern: str, parts: tuple[str, ...]) -> str:
    values = iter(parts)
    return _WILDCARD.sub(lambda _: next(values), pattern)


def _rename(table: Table, old: str, new: str) -> None:
    moved = [(_fill(new, parts), table.take(name)) for name, parts in _matches(table, old)]
    for name, entry in moved:
        table.put(name, entry)


def _same_wildcards(left: str, right: str) -> None:
    if _WILDCARD.findall(left) != _WILDCARD.findall(right):
        raise ValueError(f"{left!r} and {right!r} need the same wildcards in the same order")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Tensors without data (layouts are recognised by shapes) are equal when their shapes are."""
    import torch

    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b))
