"""What a person sees: data on stdout, everything else on stderr; rich on a terminal, plain lines elsewhere.

rich is imported where something is drawn, so that `detr --help` and shell completion do not pay for it.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detrcli.errors import DetrError
from detrcli.files import writing
from detrcli.runs.reading import printable

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1  # of every JSON document that `detr` prints


@dataclass(slots=True)
class Settings:
    """What the global options said; one process has one terminal, so there is one of these."""

    quiet: bool = False
    verbose: int = 0
    debug: bool = bool(os.environ.get("DETR_DEBUG"))
    json: bool = False  # set by a command's --json, so that errors become JSON too


settings = Settings()


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def note(text: str) -> None:
    """One line about what is going on; --quiet silences it."""
    if not settings.quiet:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def complain(text: str) -> None:
    """One line about what went wrong while the rest goes on; nothing silences it."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def detail(text: str) -> None:
    """A line for -v only."""
    if settings.verbose and not settings.quiet:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def listen() -> None:
    """Show what the library has to tell: one line each, on stderr."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (detail if record.levelno < logging.INFO else note)(record.getMessage())

    logger = logging.getLogger("detrcli")
    logger.handlers = [Notes()]
    logger.setLevel(
        logging.WARNING if settings.quiet else logging.DEBUG if settings.verbose else logging.INFO
    )


def say(text: str) -> None:
    """A line of data on stdout."""
    with writing("on stdout"):
        print(printable(text), flush=True)  # noqa: T201


def tolerate_letters() -> None:
    """On a stdout of few letters, as ASCII, the others are shown as "?"."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def emit_json(document: dict[str, Any]) -> None:
    """The one JSON document of a command."""
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")  # which then has few letters
    say(json.dumps({"schema_version": SCHEMA_VERSION, **document}, ensure_ascii=plain, allow_nan=False))


def show_error(error: DetrError) -> None:
    """`error: what` and `hint: what to type next`; with --json the same as a document on stdout."""
    if settings.json:
        body = {
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        with suppress(DetrError):  # stdout cannot be written, which may be the error itself
            emit_json({"error": body})
            return
    print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)  # noqa: T201


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: Sequence[str] = (),
) -> None:
    """A table on stdout; columns named in `right` are aligned right. In a pipe it is plain text, and nothing is cut."""
    if not sys.stdout.isatty():
        say("\n".join(_plain_table(columns, [list(row) for row in rows], title, right)))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(Text(column), justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(Text, row))  # as it is: what stands in brackets is no markup
    stdout().print(drawn)


def _plain_table(
    columns: Sequence[str], rows: list[list[str]], title: str | None, right: Sequence[str]
) -> Iterator[str]:
    widths = [max(len(line[i]) for line in [list(columns), *rows]) for i in range(len(columns))]
    if title:
        yield title
    for line in (columns, *rows):
        cells = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        )
        yield "  ".join(cells).rstrip()


def markdown(text: str) -> None:
    """A page on stdout: drawn on a terminal, as it is in a pipe."""
    if not sys.stdout.isatty():
        say(text)
        return
    from rich.markdown import Markdown

    stdout().print(Markdown(text))


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose.

    >>> duration(42.4), duration(600), duration(5400), duration(400_000)
    ('42 s', '10 min', '1.5 h', '4.6 days')
    """
    for unit, size, digits in (("days", 172_800, 1), ("h", 3600, 1), ("min", 120, 0)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


class Ticker:
    """Counts work done; `tell` replaces the words beside the count."""

    def __init__(self, draw: Any, task: Any) -> None:
        self._draw, self._task = draw, task

    def advance(self, by: int = 1) -> None:
        self._draw.advance(self._task, by)

    def tell(self, text: str) -> None:
        self._draw.update(self._task, text=text)


class _PlainLines:
    """Progress without a terminal: a whole line now and then, never a carriage return."""

    def __init__(self, what: str, total: int | None, done: int, every: float = 10.0) -> None:
        self.what, self.total, self.every = what, total, every
        self.done, self.text = done, ""
        self.started = self.told = time.monotonic()

    def advance(self, task: Any, by: int) -> None:
        self.done += by
        now = time.monotonic()
        if now - self.told >= self.every:
            self.told = now
            self._line(now)

    def update(self, task: Any, text: str) -> None:
        self.text = text

    def _line(self, now: float) -> None:
        of = f"/{self.total}" if self.total else ""
        note(f"{self.what} {self.done}{of} {self.text} {now - self.started:.0f}s".replace("  ", " "))


def can_draw() -> bool:
    """Whether what moves may be shown: on a terminal that somebody looks at."""
    hushed = settings.quiet or settings.json
    return not hushed and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress(what: str, total: int | None = None, done: int = 0) -> Iterator[Ticker]:
    """A progress bar on a terminal, a plain line every ten seconds elsewhere, silence with --quiet."""
    if not can_draw():
        yield Ticker(_PlainLines(what, total, done), None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        yield Ticker(bar, bar.add_task(what, total=total, completed=done, text=""))
