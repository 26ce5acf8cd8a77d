"""Pictures from the web, against a server on this machine."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from detrcli.errors import ImageError
from detrcli.predict import download as module
from detrcli.predict.download import download
from tests.spotter import scene, spotter


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        pass

    def do_GET(self):
        file = io.BytesIO()
        scene().save(file, "PNG")
        data = file.getvalue()
        answers = {
            "/ok.png": (200, "image/png", data, {}),
            "/untyped": (200, None, data, {}),
            "/page": (200, "text/html", b"<html>", {}),
            "/large": (200, "image/png", b"", {"Content-Length": str(1 << 40)}),
            "/endless": (200, "image/png", b"x" * 300_000, {"Content-Length": None}),
            "/cut": (200, "image/png", data[:50], {"Content-Length": str(len(data))}),
            "/moved": (302, None, b"", {"Location": "/ok.png"}),
            "/file": (302, None, b"", {"Location": "file:///etc/passwd"}),
            "/loop": (302, None, b"", {"Location": "/loop"}),
            "/%C3%BC%20b.png": (200, "image/png", data, {"Content-Length": "many"}),
            "/chunks": (
                200,
                "image/png",
                b"zz\r\n",
                {"Content-Length": None, "Transfer-Encoding": "chunked"},
            ),
            "/denied": (403, None, b"", {}),
        }
        if self.path == "/other":
            self.wfile.write(b"good day\r\n")
            return
        if self.path == "/silent":
            self.server.released.wait(10)
            return
        code, kind, body, headers = answers.get(self.path, (404, None, b"", {}))
        self.send_response(code)
        if kind:
            self.send_header("Content-Type", kind)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/ok.png", "/untyped", "/moved", "/ü b.png"])
def test_pictures_are_fetched_and_predicted(server, path):
    [result] = spotter().predict(server + path)
    assert result.source == server + path
    assert len(result) == 2


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "answers 404"),
        ("/denied", "answers 403"),
        ("/page", "sends text/html"),
        ("/large", "larger than 64 MiB"),
        ("/cut", r"cut after 50 of \d+ bytes"),
        ("/file", "answers 302|not allowed|unknown url type"),
        ("/loop", r"answers 302 [^\n]*\Z"),
        ("/chunks", "connection was cut"),
        ("/other", "not HTTP"),
    ],
)
def test_what_is_no_picture_is_said(server, path, said):
    with pytest.raises(ImageError, match=said):
        download(server + path)


def test_size_is_limited_even_when_the_server_does_not_say_it(server, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 200_000)
    with pytest.raises(ImageError, match="larger"):
        download(server + "/endless")


def test_a_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    with pytest.raises(ImageError, match="no answer in"):
        download(server + "/silent")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://", "http://[::1", "https://127.0.0.1:99999/x"]
)
def test_addresses_that_lead_nowhere_are_said(url):
    with pytest.raises(ImageError, match="http"):
        download(url)
