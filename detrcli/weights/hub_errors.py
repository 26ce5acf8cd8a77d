"""What the Hub client's many errors mean, in one line each, with what to do. Never a header, never a token."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from detrcli.errors import HubError

if TYPE_CHECKING:
    from detrcli.weights.hub import Reference

_STATUS = {
    401: ("the Hub asks for a login", "log in: hf auth login, or set HF_TOKEN"),
    403: ("the Hub denies access", "accept the repository's terms on its page, then: hf auth login"),
    404: ("the Hub does not have it", "check the name"),
    416: ("the Hub could not continue a download", "try again"),
    429: ("the Hub limits requests from here", "wait a few minutes, or log in: hf auth login"),
}


class FileAbsent(HubError):
    """The repository is there, the file is not."""


# the client's error, what it means, what to do; the first that fits, so special ones before their bases
_KNOWN = (
    (
        "GatedRepoError",
        "{repo} is gated: its owner asks you to accept terms first",
        "accept them at https://huggingface.co/{repo}, then: hf auth login",
    ),
    (
        "RepositoryNotFoundError",
        "the Hub has no repository {repo}, or it is private",
        "check the name; for a private one: hf auth login, or set HF_TOKEN",
    ),
    ("RevisionNotFoundError", "{repo} has no revision {revision}", "check the revision"),
    ("EntryNotFoundError", "{repo} has no file {file}", "name it: {repo}:FILE"),
    (
        "OfflineModeIsEnabled",
        "{repo}/{file} is not on this machine, and HF_HUB_OFFLINE is set",
        "unset it once",
    ),
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)


def explain(error: BaseException, reference: Reference, file: str) -> HubError:
    """The client wraps the true cause in a "not found locally"; that cause is what the user is told."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return explain(error.__cause__ or ConnectionError(), reference, file)
    facts = {"repo": reference.repo, "revision": reference.revision or "main", "file": file}
    for name, words, hint in _KNOWN:
        if isinstance(error, getattr(errors, name)):
            kind = FileAbsent if name == "EntryNotFoundError" else HubError
            return kind(words.format(**facts), hint=hint.format(**facts))
    what = f"{reference.repo}/{file}"
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error.response.status_code, what)
    if isinstance(
        error, errors.HfHubHTTPError.__bases__
    ):  # OSError, and the root of the network library in use
        return _by_system(error, what)
    reason = str(error).partition("\n")[0]
    return HubError(
        f"{what} could not be fetched: the Hub client failed: {type(error).__name__}: {reason}",
        hint=f"empty what is cached of it: detr zoo rm {reference.repo}",
    )


def _by_system(error: BaseException, what: str) -> HubError:
    """The disk, or the connection."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return HubError(
            f"{what} cannot be stored: {error.strerror}",
            hint="free some space, or set HF_HOME to a folder you may write to",
        )
    if "onsistency check" in str(error):
        return HubError(f"{what} arrived with another size than announced; it was not kept", hint="try again")
    return HubError(
        f"{what} could not be downloaded: the connection to the Hub failed ({type(error).__name__})",
        hint="check connection and proxy and try again; what is cached already needs none",
    )


def _by_status(status: int, what: str) -> HubError:
    words, hint = _STATUS.get(status, ("the Hub has a fault of its own", "try again later"))
    return HubError(f"{what} could not be downloaded: {words} (HTTP {status})", hint=hint)
