"""What `detr profile` found, as rows of text and as plain values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from detrcli.cli import console

if TYPE_CHECKING:
    from detrcli.profile.published import Difference
    from detrcli.profile.roofline import Bound
    from detrcli.profile.run import Memory, Profile
    from detrcli.profile.timing import Latency

Table = list[dict[str, str]]  # one dictionary a row, all with the same keys
GIGA, MEBI = 1e9, 2**20


@dataclass(frozen=True, slots=True)
class Shown:
    """Which columns were asked for."""

    gflops: bool
    params: bool
    latency: bool
    memory: bool
    published: bool
    factor: int  # operations that a multiply-add counts for


@dataclass(frozen=True, slots=True)
class Row:
    """One model."""

    profile: Profile
    memory: Memory | None = None
    latency: Latency | None = None
    roof: tuple[Bound, ...] = ()
    before: Row | None = None  # without the settings that are tried


def whole(rows: list[Row], shown: Shown) -> Table:
    """A row a model; times also as multiples of the first model's."""
    first = rows[0].latency if rows else None
    return [_whole(row, shown, first if len(rows) > 1 else None) for row in rows]


def _whole(row: Row, shown: Shown, first: Latency | None) -> dict[str, str]:
    found = row.profile
    cells = {"model": found.model.name}
    if shown.params:
        cells["params (M)"] = amount(found.params / 1e6, 1)
    if shown.gflops:
        cells["GFLOPs"] = amount(found.macs * shown.factor / GIGA, 1)
    if row.latency:
        cells |= {"ms": f"{row.latency.median * 1e3:.0f}", "ms p90": f"{row.latency.p90 * 1e3:.0f}"}
        cells["peak MiB"] = "" if row.latency.memory is None else f"{row.latency.memory / MEBI:.0f}"
        if first:
            cells["ratio"] = f"{row.latency.median / first.median:.2f}"
        cells["on"] = row.latency.device
    if row.memory:
        cells["predicting MiB"] = f"{(row.memory.weights + row.memory.inference) / MEBI:.0f}"
        cells["training MiB"] = f"{row.memory.training / MEBI:.0f}"
    if shown.published:
        cells |= _published(found, shown)
    return cells


def _published(found: Profile, shown: Shown) -> dict[str, str]:
    from detrcli.profile.published import against_published

    differences = {d.what: d for d in against_published(found, shown.factor)}
    names = (("parameters (M)", "published params"), ("GFLOPs", "published GFLOPs"))
    return {name: _difference(differences.get(what)) for what, name in names}


def _published_part(found: Profile, part: str, shown: Shown) -> dict[str, str]:
    from detrcli.profile.published import against_published, of_part

    differences = {d.what: d for d in against_published(found, shown.factor)}
    return {"published GFLOPs": _difference(differences.get(of_part(part)))}


def _difference(d: Difference | None) -> str:
    return "" if d is None else f"{d.published:g} ({d.percent:+.1f} %)"


def by_part(row: Row, shown: Shown, bare: bool) -> Table:
    """A row a part, layers under theirs; bare for programs, with the model in a column of its own."""
    found = row.profile
    names = dict.fromkeys([*found.by_part, *(row.latency.by_part if row.latency else ())])
    return [_part(row, shown, part, bare) for part in names]


def _named(model: str, part: str, bare: bool) -> dict[str, str]:
    if bare:
        return {"model": model, "part": part}
    return {"part": f"{model} {part}" if "." not in part else f"  {part}"}


def _part(row: Row, shown: Shown, part: str, bare: bool) -> dict[str, str]:
    found, macs = row.profile, row.profile.by_part.get(part, 0.0)
    params, queries = found.params_by_part.get(part), found.queries.get(part)
    cells = {
        **_named(found.model.name, part, bare),
        "params (M)": amount(params / 1e6, 2) if params else "",
        "GFLOPs": amount(macs * shown.factor / GIGA, 2),
        **(_published_part(found, part, shown) if shown.published else {}),
        "share": f"{100 * macs / found.macs:.1f} %",
        "queries": f"{queries:.0f}" if queries else "",
    }
    if row.latency:
        seconds = row.latency.by_part.get(part, 0.0)
        cells["ms"] = f"{seconds * 1e3:.1f}"
        cells["ms p90"] = f"{row.latency.by_part_p90.get(part, 0.0) * 1e3:.1f}"
    return cells


def what_if(after: Row, shown: Shown, bare: bool) -> Table:
    """Parts as they are published, and as they would be; bare for programs, with the model in a column of its own."""
    before = after.before
    assert before is not None
    old, new = before.profile.by_part, after.profile.by_part
    parts = [part for part in dict.fromkeys([*old, *new]) if "." not in part]
    model = before.profile.model.name
    rows = [
        _beside(part if bare else f"{model} {part}", old.get(part, 0.0), new.get(part, 0.0), shown)
        for part in parts
    ]
    rows.append(_beside("all", before.profile.macs, after.profile.macs, shown))
    millions = [row.profile.params / 1e6 for row in (before, after)]
    rows.append(_cells("parameters (M)", *millions))
    return [{"model": model, **row} for row in rows] if bare else rows


def _beside(name: str, old: float, new: float, shown: Shown) -> dict[str, str]:
    return _cells(f"{name} GFLOPs", old * shown.factor / GIGA, new * shown.factor / GIGA)


def _cells(name: str, old: float, new: float) -> dict[str, str]:
    change = f"{100 * (new / old - 1):+.1f} %" if old else "new"
    return {"what": name, "as published": amount(old, 2), "changed": amount(new, 2), "difference": change}


def amount(value: float, decimals: int) -> str:
    """Of a small model, too, something is seen."""
    return f"{value:.{decimals}f}" if value >= 1 or not value else f"{value:.3g}"


def roofline(rows: list[Row]) -> Table:
    """A row a part: how many operations a byte, how fast, and how near to what the machine can."""
    return [
        {
            "part": f"{row.profile.model.name} {bound.part}",
            "operations a byte": f"{bound.intensity:.1f}",
            "GFLOP/s": f"{bound.speed / GIGA:.1f}",
            "bound by": bound.by,
            "of the roof": f"{100 * bound.share:.0f} %",
        }
        for row in rows
        for bound in row.roof
        if "." not in bound.part
    ]


def remarks(row: Row, by_part: bool, published: bool) -> Iterator[str]:
    """What no column tells."""
    from detrcli.profile.published import against_published, why_not_compared

    found = row.profile
    total = sum(found.tokens)
    if by_part and total:
        scales = ", ".join(f"{count:.0f} ({100 * count / total:.1f} %)" for count in found.tokens)
        yield f"positions of each scale: {scales}"
    for name, calls in found.unknown.items():
        yield f"unknown: {calls} calls of {name}, not in the sum"
    far = [d for d in against_published(found) if not d.close] if published else []
    if far:
        differs = ", ".join(f"{d.what} {d.percent:+.1f} %" for d in far)
        yield f"differs from what is published ({differs}): {far[0].why or 'no reason is known'}"
    if published and (why := why_not_compared(found)):
        yield f"not beside published GFLOPs: {why}"


def document(row: Row, shown: Shown) -> dict[str, Any]:
    """Everything about a model, as plain values; operations already count as asked."""
    from detrcli.profile.published import against_published, why_not_compared

    found = row.profile
    return {
        "name": found.model.name,
        "size": found.size,
        "params": found.params,
        "trainable": found.trainable,
        "params_by_part": found.params_by_part,
        "flops": found.macs * shown.factor,
        "flops_by_part": {part: value * shown.factor for part, value in found.by_part.items()},
        "flops_by_operator": {name: value * shown.factor for name, value in found.by_operator.items()},
        "bytes_moved_by_part": found.moved_by_part,
        "tokens": list(found.tokens),
        "queries": found.queries,
        "not_counted": found.unknown,
        "published": [
            {
                "what": d.what,
                "published": d.published,
                "counted": d.counted,
                "percent": d.percent,
                "why": d.why,
            }
            for d in against_published(found, shown.factor)
        ],
        "not_compared": why_not_compared(found),
        **({"latency": asdict(row.latency)} if row.latency else {}),
        **({"memory": asdict(row.memory)} if row.memory else {}),
        **({"roofline": [asdict(bound) for bound in row.roof]} if row.roof else {}),
        **({"before": document(row.before, shown)} if row.before else {}),
    }


def show(table: Table, form: Literal["table", "csv", "markdown"]) -> None:
    if not table:
        return
    columns = list(table[0])
    body = [[row[column] for column in columns] for row in table]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([columns, *body])
        console.say(out.getvalue().rstrip("\n"))
    elif form == "markdown":
        for row in [columns, ["---"] + ["---:"] * (len(columns) - 1), *body]:
            console.say(f"| {' | '.join(row)} |")
    else:
        console.table(columns, body, right=[c for c in columns[1:] if c not in ("on", "bound by")])
