"""Groups whose commands are built when they are asked for: help and completion of one verb do not pay for the others.

A group is a table `name: (home, what it does in a line)`; home is `module:function`, or `module:group` for a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command, get_group

Verbs = Mapping[str, tuple[str, str]]


def _is_ready(param: TyperArgument | TyperOption, value: Any) -> bool:
    """Whether there is nothing to convert: no value, or one of the declared type, as a text for a `str` and most defaults are.
    typer would load pydantic, a third of the time of `detr zoo list`, to find that out."""
    if value is None:
        return not (param.required or param.multiple or param.nargs != 1)
    return type(value) is getattr(getattr(param, "type_descriptor", None), "annotation", None)


def _handed_on(param: TyperArgument | TyperOption, ctx: Any, value: Any) -> Any:
    return param.callback(ctx, param, value) if param.callback else value


class _Argument(TyperArgument):
    def process_value(self, ctx: Any, value: Any) -> Any:
        return _handed_on(self, ctx, value) if _is_ready(self, value) else super().process_value(ctx, value)


class _Option(TyperOption):
    def process_value(self, ctx: Any, value: Any) -> Any:
        return _handed_on(self, ctx, value) if _is_ready(self, value) else super().process_value(ctx, value)


def _light(params: list[Any]) -> list[Any]:
    for param in params:
        param.__class__ = _Argument if isinstance(param, TyperArgument) else _Option
    return params


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _light(super().get_params(ctx))


class _Commands(MutableMapping[str, Any]):
    """Commands by name; a module is imported, and the parameters of its command read, at the first look."""

    def __init__(self, verbs: Verbs) -> None:
        self._homes = {name: home for name, (home, _) in verbs.items()}
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, self._homes[name])
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._homes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def _build(name: str, home: str) -> Any:
    module, _, attribute = home.partition(":")
    target = getattr(import_module(module), attribute)
    if isinstance(target, typer.Typer):
        target.info.name = name
        return get_group(target)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, cls=_Command)(target)
    return get_command(single)


class LazyGroup(TyperGroup):
    """A group of a table of verbs; `group()` makes one for a table."""

    verbs: ClassVar[Verbs] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands(self.verbs)

    def get_params(self, ctx: Any) -> list[Any]:
        return _light(super().get_params(ctx))

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(self.commands)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.verbs.items()])


def group(verbs: Verbs, *, base: type[LazyGroup] = LazyGroup, **settings: Any) -> typer.Typer:
    """An application whose verbs are those of the table. Help is plain text: it reads the same in a pipe, and at once."""
    cls = type(base.__name__, (base,), {"verbs": verbs})
    return typer.Typer(cls=cls, no_args_is_help=True, rich_markup_mode=None, **settings)
