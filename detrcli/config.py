"""Typed settings: frozen dataclasses, to and from plain JSON/TOML values, changed only through checked paths.

    assign(recipe, {"lr": 1e-4, "schedule.drop": 40})      a changed copy, or a UsageError naming the field and the nearest ones
    from_plain(DetrConfig, {"num_queries": 100, ...})      the same checks for a whole table; unknown keys are refused

Our own hundred lines rather than pydantic: they keep `detr --help` free of a heavy import and can name the nearest key of a
nested path, which pydantic cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from detrcli.errors import UsageError, unknown

T = TypeVar("T")
_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(
    typing.get_type_hints
)  # slow; plugins are checked at every start
Plain = Any  # None, bool, int, float, str, list or dict of these


def to_plain(value: Any) -> Plain:
    """The value as JSON and TOML can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return value


def from_plain(kind: type[T], table: Mapping[str, Plain], where: str = "") -> T:
    """An instance of the dataclass `kind`; missing fields take their defaults, unknown ones are an error."""
    hints = _field_types(kind)
    for key in table:
        if key not in hints:
            raise unknown("setting", where + key, (where + name for name in hints))
    values = {key: _convert(value, hints[key], where + key) for key, value in table.items()}
    return _build(kind, values, where)


def assign(value: T, changes: Mapping[str, Plain], where: str = "") -> T:
    """A copy of the dataclass `value` with dotted paths changed, every step checked against the declared types."""
    hints = _field_types(type(value))
    nested: dict[str, dict[str, Plain]] = {}
    changed: dict[str, Any] = {}
    for path, new in changes.items():
        key, _, rest = path.partition(".")
        if key not in hints:
            raise unknown("setting", where + path, (where + name for name in settings(value)))
        if rest:
            nested.setdefault(key, {})[rest] = new
        elif isinstance(new, Mapping) and dataclasses.is_dataclass(getattr(value, key)):
            nested.setdefault(key, {}).update(new)
        else:
            changed[key] = _convert(new, hints[key], where + key)
    for key, inner in nested.items():
        current = changed.get(key, getattr(value, key))
        if isinstance(current, Mapping):
            kept = {name: item for name, item in current.items() if name not in inner}
            changed[key] = _convert(inner | kept, hints[key], where + key)  # new ones first: first match wins
        elif dataclasses.is_dataclass(current):
            changed[key] = assign(current, inner, f"{where}{key}.")
        else:
            raise UsageError(
                f"setting {where + key!r} has no parts", hint=f"set it whole: --set {where + key}=…"
            )
    return _build(type(value), {**_shallow(value), **changed}, where)


def settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted path of a dataclass with its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            found |= settings(item, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = item
    return found


def in_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """A law for `__post_init__`: a ValueError unless the value, which may not be NaN either, is between the two."""
    if not least <= value <= most:
        bound = f"at most {most}" if value > most else f"at least {least}"
        raise ValueError(f"{name} must be {bound} (value given: {value})")


def at_least(least: int, config: object, *names: str) -> None:
    """`in_range` for fields of a configuration, in its `__post_init__`; a field that is None has no bound."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            in_range(name, value, least)


def probabilities(config: object, *names: str) -> None:
    """`in_range` for fields between 0 and 1."""
    for name in names:
        in_range(name, getattr(config, name), 0, 1)


def parse_assignments(texts: list[str]) -> dict[str, Plain]:
    """`["lr=1e-4", "name=tiny"]` as a table; values are TOML literals, else plain strings."""
    table: dict[str, Plain] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise UsageError(
                f"--set needs PATH=VALUE (value given: {text!r})",
                hint="for example: --set num_queries=100, in training --set model.num_queries=100",
            )
        table[path.strip()] = _literal(value.strip())
    return table


def _literal(text: str) -> Plain:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass
        optional = {field.default, field.default_factory} != {dataclasses.MISSING}
        if field.name not in values and not optional:
            raise UsageError(f"setting {where}{field.name} is missing", hint=field.metadata.get("question"))
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # a missing field, or a law broken in __post_init__
        raise UsageError(f"{where or kind.__name__ + ': '}{error}") from error


def _shallow(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _field_types(kind: type[Any]) -> dict[str, Any]:
    hints = _type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _convert(value: Plain, kind: Any, where: str) -> Any:
    """`value` as an instance of the declared type, or a UsageError that names the path and the type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise unknown(f"value for {where}:", str(value), (str(a) for a in args))
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return _convert_tuple(value, args, where, kind)
    if (origin is dict or origin in (Mapping,)) and isinstance(value, Mapping):
        return {str(key): _convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return from_plain(kind, value, f"{where}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_kind = origin is None and isinstance(kind, type) and isinstance(value, kind)
    if is_kind and not (
        isinstance(value, bool) and kind in (int, float)
    ):  # True is an int to Python, not to a user
        return value
    raise UsageError(
        f"{where} needs {_describe(kind)} (value given: {value!r})",
        hint=f"for example: --set {where}={_example(kind)}",
    )


def _convert_union(value: Plain, kinds: tuple[Any, ...], where: str) -> Any:
    if type(None) in kinds and (value is None or value == "none"):  # TOML has no null
        return None
    choices = [k for k in kinds if k is not type(None)]
    for kind in choices[:-1]:
        try:
            return _convert(value, kind, where)
        except UsageError:
            continue
    return _convert(value, choices[-1], where)


def _convert_tuple(
    value: list[Plain] | tuple[Plain, ...], kinds: tuple[Any, ...], where: str, kind: Any
) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_convert(item, kinds[0], f"{where}[{i}]") for i, item in enumerate(value))
    if len(kinds) != len(value):
        raise UsageError(f"{where} needs {_describe(kind)} (value given: {list(value)!r})")
    return tuple(
        _convert(item, k, f"{where}[{i}]") for i, (item, k) in enumerate(zip(value, kinds, strict=True))
    )


def _describe(kind: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(kind, type) and kind in plain:
        return plain[kind]
    return str(kind).replace("typing.", "")


def _example(kind: Any) -> str:
    examples = {int: "3", float: "0.1", bool: "true", str: "name"}
    return examples.get(kind, "'[1, 2]'") if isinstance(kind, type) else "'[1, 2]'"
