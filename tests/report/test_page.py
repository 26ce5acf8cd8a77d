"""The page of a run: well formed, complete in itself, and deaf to what a run may say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from detrcli import toml
from detrcli.report import page
from detrcli.runs.run import open_run

VOID = {"meta", "img", "link", "br", "hr", "input"}
HOSTILE = (
    "\"><img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>&\x1b]0;x\x07"
)


class Checked(HTMLParser):
    """Every element closed in order; every attribute by name, to be looked at."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def forged(folder, text=HOSTILE):
    """A run that says `text` wherever a run can say something."""
    folder.mkdir(parents=True)
    about = {"status": "failed", "best_ap": 0.5, "metrics": {"ap": 0.5, text: 0.1}}
    texts = dict.fromkeys(("model", "data", "error", "started_at", "finished_at"), text)
    (folder / "run.json").write_text(json.dumps(about | texts))
    table = toml.dumps({text: text, "set": {"model": {text: [text]}}})
    (folder / "config.toml").write_text(table, encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"command": text, text: {text: text}}))
    steps = [{"step": i, "epoch": 0, "loss": 1 / (i + 1), text: 1.0} for i in range(5)]
    (folder / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(s)}\n" for s in steps) + '{"step": 5, "epoch": 1, "ap": 0.5}\n'
    )
    samples = folder / "samples"
    samples.mkdir()
    (samples / "1.jpg").write_bytes(b"\xff\xd8\xff" + b"0" * 20)
    (samples / "2.jpg").write_text("<svg onload=alert(1)>")
    (samples / "3.jpg").symlink_to("/etc/passwd")
    entries = [{"file": f, "caption": text} for f in ("1.jpg", "2.jpg", "3.jpg", "../run.json", text, 7)]
    (samples / "samples.json").write_text(json.dumps({"step": text, "pictures": [*entries, text, None]}))
    return folder


@pytest.fixture
def hostile(tmp_path):
    return forged(tmp_path / "a<b>&run")


@pytest.fixture(params=["run", "runs"])
def text(request, hostile):
    run = open_run(hostile)
    return page.of_run(run) if request.param == "run" else page.of_runs([run, run])


def test_a_page_is_well_formed_and_asks_for_nothing(text):
    checked = Checked(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(checked.tags)
    assert not [
        name
        for _, name, _ in checked.attributes
        if name.startswith("on") or name in ("href", "srcset", "action")
    ]
    sources = [value for _, name, value in checked.attributes if name in ("src", "data", "xlink:href")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert not re.search(r"url\(|@import", text)
    policy = next(value for tag, name, value in checked.attributes if tag == "meta" and name == "content")
    assert policy.startswith("default-src 'none'")


def test_what_a_run_says_is_text(text):
    assert "\x1b" not in text
    assert "<script" not in text
    said = "".join(Checked(text).said)
    assert "<script>document.title='hacked'</script>" in said


def test_only_pictures_of_the_run_are_taken_in(hostile):
    sources = [
        value for _, name, value in Checked(page.of_run(open_run(hostile))).attributes if name == "src"
    ]
    assert len(sources) == 1


def test_a_run_without_anything_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "running"}')
    assert "Nothing was measured yet" in page.of_run(open_run(tmp_path))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_and_runs_nothing(hostile, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page.of_run(open_run(hostile)), encoding="utf-8")
    # without the policy too: escaping alone must hold
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv[^>]*>", "", file.read_text()), encoding="utf-8")
    for one in (file, bare):
        shown = _dom(one, tmp_path)
        title = re.search(r"<title>(.*?)</title>", shown)
        assert title
        assert title[1] == "a&lt;b&gt;&amp;run"
        assert shown.count("<svg") == 3
        assert "<script" not in shown


def _dom(file: Path, folder: Path) -> str:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout
