"""Pictures from the web: http and https only, limited in size and time."""

from __future__ import annotations

import http.client
import string
import urllib.error
import urllib.parse
import urllib.request

from detrcli.errors import ImageError
from detrcli.version import __version__

LARGEST = 64 << 20  # bytes
TIMEOUT = 20.0  # seconds without an answer
PICTURES = ("image/", "application/octet-stream", "binary/octet-stream")


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """The bytes behind a URL, or an ImageError in one line."""
    headers = {"User-Agent": f"detrcli/{__version__}", "Accept": "image/*"}
    try:
        address = urllib.parse.quote(url, safe=string.punctuation)  # other letters, as browsers do
        request = urllib.request.Request(address, headers=headers)
        with _opener().open(request, timeout=TIMEOUT) as answer:
            return _body(answer, url)
    except urllib.error.HTTPError as error:
        reason = (str(error.reason).splitlines() or [""])[0]
        raise ImageError(f"{url}: the server answers {error.code} {reason}") from None
    except urllib.error.URLError as error:
        raise ImageError(f"{url}: {_plain(error.reason)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"{url}: {_plain(error)}") from None


def _opener() -> urllib.request.OpenerDirector:
    """Follows redirects, but only to http and https: never to a file or another protocol."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _body(answer: http.client.HTTPResponse, url: str) -> bytes:
    kind = answer.headers.get_content_type() if "Content-Type" in answer.headers else "image/"
    if not kind.startswith(PICTURES):
        raise ImageError(f"{url}: the server sends {kind}, not a picture")
    length = answer.headers.get("Content-Length") or ""
    said = int(length) if length.isascii() and length.isdigit() else 0
    data = b"" if said > LARGEST else answer.read(LARGEST + 1)
    if max(said, len(data)) > LARGEST:
        raise ImageError(f"{url}: larger than {LARGEST >> 20} MiB")
    if len(data) < said:
        raise ImageError(f"{url}: the connection was cut after {len(data)} of {said} bytes")
    return data


def _plain(reason: object) -> str:
    if isinstance(reason, http.client.IncompleteRead):
        return "the connection was cut"
    if isinstance(reason, http.client.BadStatusLine):
        return "the server's answer is not HTTP"
    if isinstance(reason, TimeoutError):
        return f"no answer in {TIMEOUT:.0f} s"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror.lower()
    return str(reason) or type(reason).__name__
