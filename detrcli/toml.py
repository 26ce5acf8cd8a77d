"""TOML files of settings: written so that they can be read back, read so that a mistake in one has a line."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detrcli.errors import UsageError

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_NAME = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_UNSPELLABLE = re.compile(r"[\x7f\ud800-\udfff]")  # JSON leaves them as they are, TOML does not have them


def dumps(table: Mapping[str, Any]) -> str:
    """The table as TOML: values first, then a section for each table in it. None is written as "none"."""
    return "\n".join(_section(table, ())) + "\n"


def read(file: Path) -> dict[str, Any]:
    """The table in a file; an error with the place where it is not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not TOML: {error}", hint="it holds lines such as: seed = 1") from error


def keys(file: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Every `key =` and `[table]` with its line, as far as lines tell."""
    return list(_keys(file.read_text(encoding="utf-8")))


def _keys(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    table: tuple[str, ...] = ()
    for line, content in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", content):
            table = _parts(head[1])
            yield line, table
        elif key := re.match(rf"\s*({_NAME}(?:\s*\.\s*{_NAME})*)\s*=", content):
            yield line, table + _parts(key[1])


def _parts(key: str) -> tuple[str, ...]:
    """`a."b.c"` as its names."""
    try:
        inner: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    names = []
    while isinstance(inner, dict):
        ((name, inner),) = inner.items()
        names.append(name)
    return tuple(names)


def _section(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in table.items() if key not in inner}
    if path and (plain or not inner):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in plain.items():
        yield f"{_key(key)} = {_value(value)}"
    for key, value in inner.items():
        yield from _section(value, (*path, key))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items())}}}"
    return _text(str(value))


def _text(text: str) -> str:
    return _UNSPELLABLE.sub(lambda found: _escaped(found[0]), json.dumps(text, ensure_ascii=False))


def _escaped(letter: str) -> str:
    if letter != "\x7f":
        raise UsageError(
            "a text with half a letter in it cannot be written as TOML", hint="rename the file or folder"
        )
    return "\\u007f"
