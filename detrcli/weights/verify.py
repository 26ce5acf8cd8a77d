"""Are these still the weights they were? The file is hashed again, loaded whole, and asked for its fingerprint."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detrcli.errors import DetrError, HubError, VerificationError
from detrcli.files import home, replacing
from detrcli.weights import hub, ledger
from detrcli.weights.fingerprint import differs, fingerprint
from detrcli.weights.ledger import sha256_of
from detrcli.weights.opened import Opened, open_weights
from detrcli.weights.resolve import Choice


@dataclass(frozen=True, slots=True)
class Verified:
    model: str
    path: Path
    sha256: str
    hash_from: str  # what the hash was compared with
    fingerprint_from: str  # what the answers were compared with
    tensors: int


def verify(choice: Choice) -> Verified:
    """Every check on a file of this machine; the first that fails is a VerificationError."""
    path, sha256, hash_from = _hash(choice)
    opened = open_weights(choice, offline=True)
    now = fingerprint(opened.module, opened.preprocess)
    if not all(map(math.isfinite, now)):
        raise VerificationError(f"{path} answers with numbers that are not finite", hint="get it again")
    before, source = _known(opened, sha256)
    if before is not None and differs(now, before):
        raise VerificationError(
            f"{path} gives other answers than {source}: {list(now)} instead of {list(before)}",
            hint="the program or its libraries changed: compare `detr env` of both, or train anew",
        )
    if before is None:
        _remember(opened.model.name, sha256, now)
    return Verified(opened.model.name, path, sha256, hash_from, source, len(opened.report.kept))


def _hash(choice: Choice) -> tuple[Path, str, str]:
    """A file of ours carries its own hash, which loading compares; one of the Hub is compared here, read anew."""
    if isinstance(choice.source, Path):
        return choice.source, sha256_of(choice.source), "the hash in the file"
    reference = choice.source
    file = reference.file or hub.USUAL_FILES[0]
    path = hub.cached(reference, file)
    if path is None:
        raise HubError(f"{reference} is not on this machine", hint=f"detr zoo pull {reference}")
    record = ledger.find(reference.repo, reference.revision or "main", file)
    known = reference.sha256 or (record.sha256 if record else None) or hub.hash_in_name(path.resolve())
    found = sha256_of(path)
    if known is not None and found != known:
        raise VerificationError(
            f"{path} has changed: sha256 {found[:12]}…, expected {known[:12]}…",
            hint=f"fetch it again: detr zoo rm {reference.repo}, detr zoo pull {reference}",
        )
    source = (
        "the declaration" if reference.sha256 else "its first download" if record else "its name on the Hub"
    )
    return path, found, source


def _known(opened: Opened, sha256: str) -> tuple[Sequence[float] | None, str]:
    """The stored fingerprint: inside a file of ours, else recorded on this machine."""
    stored = opened.said.made.get("fingerprint") if opened.said else None
    if isinstance(stored, list):
        return stored, "when it was converted"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return list(map(float, json.loads(_place(sha256).read_text())["values"])), "recorded before"
    return None, "nothing: recorded now"


def _remember(model: str, sha256: str, values: Sequence[float]) -> None:
    with contextlib.suppress(DetrError), replacing(_place(sha256)) as temporary:
        temporary.write_text(json.dumps({"model": model, "values": list(values)}))


def _place(sha256: str) -> Path:
    return home() / "fingerprints" / f"{sha256}.json"
