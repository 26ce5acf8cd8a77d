"""Weights from the Hugging Face Hub: pinned to a commit, hashed by us, from the cache first.

The client checks only sizes; a flipped byte of the right size would pass and stay cached. So every file is hashed and compared
with the hash that its declaration states, or that its first download recorded (trust on first use), or that the Hub stores it
under. A mismatch deletes the file and fetches it once more.

The token is the client's business (HF_TOKEN, `hf auth login`); nothing here reads or prints it.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from detrcli.errors import HubError, UsageError
from detrcli.plugins.contract import Weights
from detrcli.weights import ledger
from detrcli.weights.hub_errors import FileAbsent, explain
from detrcli.weights.ledger import Record, sha256_of

logger = logging.getLogger(__name__)
USUAL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+))?")


@dataclass(frozen=True, slots=True)
class Reference:
    """`owner/repo[@revision][:file]`."""

    repo: str
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    provenance: str = ""  # licence and origin, shown before a download

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    @classmethod
    def parse(cls, text: str) -> Reference:
        match = _REFERENCE.fullmatch(text)
        if match is None or _leads_out(match["file"] or "") or _leads_out(match["revision"] or ""):
            raise UsageError(
                f"{text!r} is neither a file, a run nor a Hub reference",
                hint="a Hub reference is owner/repo, owner/repo@revision or owner/repo@revision:file",
            )
        return cls(match["repo"], match["revision"], match["file"])

    @classmethod
    def declared(cls, weights: Weights) -> Reference:
        provenance = f"licence {weights.license}, trained on {weights.trained_on}"
        if weights.note:
            provenance = f"{provenance}; {weights.note}"
        return cls(weights.repo, weights.revision, weights.filename, weights.sha256, provenance)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file of the Hub on this machine."""

    path: Path
    repo: str
    commit: str
    file: str
    sha256: str
    first_use: bool  # nothing was known to compare it with: what came is recorded now

    def __str__(self) -> str:
        text = f"{self.repo}@{self.commit}:{self.file} (sha256 {self.sha256[:12]}…)"
        return f"{text}, recorded at this first use" if self.first_use else text


def fetch(reference: Reference, *, offline: bool = False) -> Fetched:
    """The file of a reference: from the cache without any request, else downloaded; compared with its hash either way."""
    if reference.file:
        return _fetch(reference, reference.file, offline)
    for name in _usual_files(reference):
        try:
            return _fetch(reference, name, offline)
        except FileAbsent:
            continue
    raise FileAbsent(
        f"{reference.repo} holds none of {', '.join(USUAL_FILES)}",
        hint=f"name the file: {reference}:FILE",
    )


def companion(reference: Reference, name: str, *, offline: bool = False) -> Path | None:
    """A file in the folder of a reference's weights, which were fetched before; None where the repository has none."""
    weights = fetch(reference, offline=True)
    file = str(PurePosixPath(weights.file).with_name(name))
    absent = _cache_of(weights.repo) / ".no_exist" / weights.commit / file  # the client's note that it asked
    if absent.exists():
        return None
    try:
        return _fetch(Reference(weights.repo, weights.commit), file, offline).path
    except HubError:  # it only helps
        return None


def _usual_files(reference: Reference) -> list[str]:
    """The one that was used before comes first, then one that is here: neither costs a request, nor may a file that the
    repository got since take its place."""
    requested = reference.revision or "main"

    def rank(name: str) -> tuple[bool, bool]:
        return ledger.find(reference.repo, requested, name) is None, cached(reference, name) is None

    return sorted(USUAL_FILES, key=rank)


def cached(reference: Reference, file: str) -> Path | None:
    """The file in the client's cache, found without importing the client's network parts."""
    folder = _cache_of(reference.repo)
    revision = _revision(reference, file)
    try:
        commit = (folder / "refs" / revision).read_text(errors="replace").strip()
    except OSError:
        commit = revision
    path = folder / "snapshots" / commit / file
    return path if path.is_file() else None


def search(text: str, limit: int = 20) -> list[dict[str, str | int]]:
    """Detection repositories on the Hub whose name holds the text, most downloaded first."""
    if _offline_by_environment():
        raise HubError("the Hub cannot be searched: HF_HUB_OFFLINE is set", hint="unset it once")
    from huggingface_hub import HfApi

    try:
        found = list(
            HfApi().list_models(search=text, filter="object-detection", sort="downloads", limit=limit)
        )
    except Exception as error:  # as in _download
        raise explain(error, Reference(text), "search") from error
    return [
        {
            "repo": info.id,
            "license": next(
                (t.removeprefix("license:") for t in info.tags or () if t.startswith("license:")),
                "not stated",
            ),
            "downloads": info.downloads or 0,
            "changed": info.last_modified.date().isoformat() if info.last_modified else "",
        }
        for info in found
    ]


def forget(repo: str) -> list[Path]:
    """Delete what the cache holds of a repository and what was recorded of it; the folders that are gone."""
    folders = [_cache_of(repo), ledger.folder(repo)]
    try:
        for folder in (present := [f for f in folders if f.is_dir()]):
            if folder.is_symlink():  # to a folder that may be others' too
                folder.unlink()
            else:
                shutil.rmtree(folder)
    except OSError as error:
        raise HubError(f"cannot delete {error.filename}: {error.strerror}") from error
    return present


def size_of(repo: str) -> int:
    """Bytes that the cache holds of a repository."""
    folder = _cache_of(repo) / "blobs"
    return sum(blob.stat().st_size for blob in folder.glob("*")) if folder.is_dir() else 0


def _cache_of(repo: str) -> Path:
    from huggingface_hub import constants  # light: none of the client's network parts

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _revision(reference: Reference, file: str) -> str:
    """The commit that an unpinned reference meant when it was first used here, else the revision itself."""
    requested = reference.revision or "main"
    record = ledger.find(reference.repo, requested, file)
    return record.commit if record else requested


def _fetch(reference: Reference, file: str, offline: bool) -> Fetched:
    from detrcli.weights.metadata import SHARD_INDEX, shard_names

    requested = reference.revision or "main"
    record = ledger.find(reference.repo, requested, file)
    expected = reference.sha256 or (record.sha256 if record else None)
    try:
        path, found = _matching(reference, file, expected, record, offline or _offline_by_environment())
        _record(reference.repo, requested, file, path, found).write()
    except OSError as error:
        raise HubError(
            f"the Hub cache cannot be used: {error.strerror or error}: {error.filename or ''}".rstrip(": "),
            hint="free some space, or set HF_HOME to a folder you may write to",
        ) from error
    fetched = Fetched(path, reference.repo, _commit(path, file), file, found, first_use=expected is None)
    if file.endswith(SHARD_INDEX):
        for part in shard_names(path):
            _fetch(Reference(reference.repo, fetched.commit), part, offline)
    return fetched


def _matching(
    reference: Reference, file: str, expected: str | None, record: Record | None, offline: bool
) -> tuple[Path, str]:
    """A file whose hash is right, and the hash; a wrong one is deleted and fetched once more."""
    for _ in range(2):
        path = cached(reference, file) or _download(reference, file, offline)
        blob = path.resolve()
        found = (record and record.hash_of(blob)) or sha256_of(blob)
        wanted = expected or hash_in_name(blob) or found
        if found == wanted:
            return path, found
        blob.unlink()
        path.unlink(missing_ok=True)
        record = None
        if offline:
            break
    raise HubError(
        f"{reference.repo}/{file} does not match its sha256 (expected {wanted[:12]}…, got {found[:12]}…); it was deleted",
        hint="try again online; if it stays so, the repository or the connection is not to be trusted",
    )


def _record(repo: str, requested: str, file: str, path: Path, sha256: str) -> Record:
    blob = path.resolve()
    state = blob.stat()
    return Record(
        repo, requested, file, _commit(path, file), sha256, str(blob), state.st_size, state.st_mtime_ns
    )


def _commit(path: Path, file: str) -> str:
    """The cache lays files out as snapshots/<commit>/<file>."""
    return path.parents[len(PurePosixPath(file).parts) - 1].name


def hash_in_name(blob: Path) -> str | None:
    """Large files lie in the cache under the sha256 that the Hub gave; small ones under another kind of hash."""
    return blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _leads_out(path: str) -> bool:
    return path.startswith("/") or "\\" in path or ".." in path.split("/")


def _no_bars_in_a_pipe() -> None:
    if not (sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def _offline_by_environment() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _download(reference: Reference, file: str, offline: bool) -> Path:
    if offline:
        raise HubError(
            f"{reference.repo}/{file} is not on this machine, and this is offline",
            hint=f"once online: detr zoo pull {reference}",
        )
    from huggingface_hub import hf_hub_download

    from detrcli.version import __version__

    told = reference.provenance or f"licence: see https://huggingface.co/{reference.repo}"
    logger.info("downloading %s/%s (%s)", reference.repo, file, told)
    _no_bars_in_a_pipe()
    try:
        path = hf_hub_download(
            reference.repo,
            file,
            revision=_revision(reference, file),
            library_name="detrcli",
            library_version=__version__,
        )
    except Exception as error:  # the client's errors, those of its network library and of the disk
        raise explain(error, reference, file) from error
    return Path(path)
