"""A Hub on this machine, as far as downloading goes: two origins, one for repositories and one for large files.

Large files are redirected to the second origin, as the Hub redirects to its CDN; the client follows redirects of a HEAD only
within one origin, so one server would not do. Faults are put on a repository and wear off after a number of requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote, urlparse

Body = Literal["flip", "short", "cut", "stall"]


@dataclass
class Fault:
    """What goes wrong: a status with the Hub's error code, or a body that is not what was announced."""

    at: Literal["hub", "cdn"] = "hub"
    status: int | None = None
    code: str = ""
    body: Body | None = None
    times: int = 10**9


@dataclass
class Repo:
    commit: str
    files: dict[str, bytes]
    faults: list[Fault] = field(default_factory=list)
    token: str | None = None  # needed to read it
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    odd: dict[str, str] = field(default_factory=dict)  # headers instead of the right ones; no value: left out


@dataclass
class Request:
    origin: str
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.go_on = threading.Event()  # ends a stall
        self.servers = {name: _Server(self, name) for name in ("hub", "cdn")}

    @property
    def url(self) -> str:
        return self.servers["hub"].url

    def add(self, repo: str, files: dict[str, bytes], *faults: Fault, token: str | None = None) -> Repo:
        """A repository at a commit that its content determines."""
        self.repos[repo] = Repo(commit_of(repo, files), files, list(faults), token)
        return self.repos[repo]

    def push(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit on main; the old one stays."""
        held = self.repos[repo]
        held.older[held.commit] = held.files
        held.commit, held.files = commit_of(repo, files), files
        return held.commit

    def seen(self, repo: str) -> list[Request]:
        return [r for r in self.requests if repo in r.path]

    def fault(self, repo: Repo, origin: str) -> Fault | None:
        for fault in repo.faults:
            if fault.at == origin and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def commit_of(repo: str, files: dict[str, bytes]) -> str:
    return hashlib.sha1(
        repo.encode() + b"".join(n.encode() + c for n, c in sorted(files.items()))
    ).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    threads = [
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in hub.servers.values()
    ]
    for thread in threads:
        thread.start()
    yield hub
    for server in hub.servers.values():
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, origin: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.origin = hub, origin
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `Hub.requests`."""

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, *, send_body: bool) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.server.origin, self.command, self.path, headers))
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts == ["api", "models"]:
            return self.listing(send_body)
        repo = hub.repos.get("/".join(parts[:2]))
        if repo is None:
            self.refuse(401, "RepoNotFound")
        elif self.server.origin == "cdn":
            self.large_file(repo, parts[3], send_body)
        elif (fault := hub.fault(repo, "hub")) is not None:
            self.refuse(fault.status or 500, fault.code)
        elif repo.token and headers.get("authorization") != f"Bearer {repo.token}":
            self.refuse(401, "GatedRepo")
        else:
            self.resolve(repo, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), send_body)

    def listing(self, send_body: bool) -> None:
        """The search of the Hub: every repository whose name holds the text."""
        text = parse_qs(urlparse(self.path).query).get("search", [""])[0]
        rows = [
            {"id": name, "modelId": name, "tags": ["license:mit", "object-detection"], "downloads": 7}
            for name in self.server.hub.repos
            if text in name
        ]
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(rows).encode(), send_body)

    def resolve(self, repo: Repo, name: str, revision: str, path: str, send_body: bool) -> None:
        commit = repo.commit if revision == "main" else revision
        files = repo.files if commit == repo.commit else repo.older.get(commit)
        if files is None:
            self.refuse(404, "RevisionNotFound")
        elif path not in files:
            self.refuse(404, "EntryNotFound", commit)
        elif path.endswith(".json"):
            etag = hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest()
            self.reply(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[path], send_body)
        else:
            sha256 = hashlib.sha256(files[path]).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(files[path]))}
            place = f"{self.server.hub.servers['cdn'].url}/{name}/lfs/{sha256}"
            headers = {"Location": place, "X-Repo-Commit": commit, **linked} | repo.odd
            self.reply(302, {k: v for k, v in headers.items() if v}, b"", send_body)

    def large_file(self, repo: Repo, sha256: str, send_body: bool) -> None:
        versions = [repo.files, *repo.older.values()]
        content = next(c for f in versions for c in f.values() if hashlib.sha256(c).hexdigest() == sha256)
        fault = self.server.hub.fault(repo, "cdn")
        if fault and fault.status:
            return self.refuse(fault.status, fault.code)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, headers, content[start:], send_body, fault.body if fault else None)

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        if commit:
            headers["X-Repo-Commit"] = commit
        if status == 429:
            headers["Retry-After"] = "1"
        self.reply(status, headers, b"", self.command == "GET")

    def reply(
        self, status: int, headers: dict[str, str], content: bytes, send_body: bool, body: Body | None = None
    ) -> None:
        announced = len(content)
        if body == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif body == "short":
            content = content[: announced // 2]
            announced = len(content)
        elif body in ("cut", "stall"):
            content = content[: announced // 2]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(announced)}).items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(content)
        if body == "stall":
            self.server.hub.go_on.wait(60)
        if body in ("cut", "stall"):
            self.close_connection = True
