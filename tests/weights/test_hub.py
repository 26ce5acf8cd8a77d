"""Every way a download can go, with the real client against a Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights.hub_server import Fault, Hub, serving

CHILD = Path(__file__).parent / "hub_child.py"
TOKEN = "hf_secretsecretsecret"
CONTENT = bytes(range(256)) * 40
FILE = {"model.safetensors": CONTENT}
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CHUNK = 10 << 20  # bytes that the client writes at a time
LARGE = CONTENT * (2 * CHUNK // len(CONTENT) + 300)  # half of it is more than a chunk


class Child:
    """A process with the client in it, its own cache and its own memory of downloads."""

    def __init__(self, folder: Path, endpoint: str, **environment: str) -> None:
        self.cache, self.home = folder / "hf" / "hub", folder / "home"
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf"),
            "DETR_HOME": str(self.home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        self.stderr = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env=inherited | settings,
        )

    def ask(self, reference: str, **options: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"reference": reference, **options}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def fetch(self, reference: str, **options: Any) -> dict[str, Any]:
        self.ask(reference, **options)
        return self.answer()

    def said(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def blobs(self, repo: str) -> list[Path]:
        folder = self.cache / f"models--{repo.replace('/', '--')}" / "blobs"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()
        self.stderr.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def child(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(tmp_path_factory.mktemp("child"), hub.url, HF_TOKEN=TOKEN)
    yield child
    child.close()


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository name of its own for every test, so that they may share a process."""
    return "owner/" + re.sub(r"\W+", "-", request.node.name).strip("-")[-60:].lstrip("-_")


def test_a_file_is_fetched_once_and_then_without_a_single_request(hub: Hub, child: Child, repo: str):
    commit = hub.add(repo, FILE).commit
    first = child.fetch(repo)
    assert (first["commit"], first["sha256"], first["first_use"]) == (commit, SHA256, True)
    assert Path(first["path"]).read_bytes() == CONTENT
    before = len(hub.requests)
    again = child.fetch(repo)
    assert again == first | {"first_use": False}
    assert len(hub.requests) == before


def test_the_token_goes_to_the_hub_and_not_to_the_other_origin(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE, token=TOKEN)
    assert "path" in child.fetch(repo)
    seen = hub.seen(repo)
    assert {r.headers.get("authorization") for r in seen if r.origin == "hub"} == {f"Bearer {TOKEN}"}
    assert {r.headers.get("authorization") for r in seen if r.origin == "cdn"} == {None}
    assert any("detrcli" in r.headers["user-agent"] for r in seen)


def test_one_flipped_byte_is_noticed_and_fetched_again(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE, Fault("cdn", body="flip", times=1))
    found = child.fetch(repo, sha256=SHA256)
    assert Path(found["path"]).read_bytes() == CONTENT
    assert sum(r.origin == "cdn" and r.method == "GET" for r in hub.seen(repo)) == 2


@pytest.mark.parametrize("declared", [SHA256, None])
def test_a_byte_that_is_always_flipped_ends_with_nothing_kept(
    hub: Hub, child: Child, repo: str, declared: str | None
):
    hub.add(repo, FILE, Fault("cdn", body="flip"))
    found = child.fetch(repo, sha256=declared)
    assert found["exit_code"] == 4
    assert "does not match its sha256" in found["error"]
    assert child.blobs(repo) == []


def test_a_file_that_is_not_the_declared_one_is_refused(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    found = child.fetch(repo, sha256="0" * 64)
    assert (found["kind"], found["exit_code"]) == ("hub", 4)
    assert "expected 000000000000" in found["error"]
    assert child.blobs(repo) == []


def test_damage_on_this_disk_is_noticed_and_repaired(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    child.fetch(repo)
    (blob,) = child.blobs(repo)
    blob.write_bytes(CONTENT[:-1] + b"\0")
    assert Path(child.fetch(repo)["path"]).read_bytes() == CONTENT


def test_damage_offline_is_an_error_not_an_answer(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    child.fetch(repo)
    (blob,) = child.blobs(repo)
    blob.write_bytes(CONTENT[:-1] + b"\0")
    assert "does not match its sha256" in child.fetch(repo, offline=True)["error"]


def test_an_unpinned_name_keeps_the_meaning_it_had_first(hub: Hub, child: Child, repo: str):
    first = hub.add(repo, FILE).commit
    child.fetch(repo)
    newer = hub.push(repo, {"model.safetensors": CONTENT + b"new"})
    assert child.fetch(repo)["commit"] == first
    for blob in child.blobs(repo):  # even when the cache was emptied
        blob.unlink()
    assert child.fetch(repo)["commit"] == first
    assert child.fetch(f"{repo}@{newer}")["commit"] == newer


def test_a_commit_whose_content_changed_since_is_refused(hub: Hub, child: Child, repo: str):
    held = hub.add(repo, FILE)
    child.fetch(f"{repo}@{held.commit}")
    held.files = {"model.safetensors": CONTENT + b"rewritten"}
    for blob in child.blobs(repo):
        blob.unlink()
    assert "does not match its sha256" in child.fetch(f"{repo}@{held.commit}")["error"]


STATUSES = [
    (Fault(status=401, code="RepoNotFound"), "has no repository", "hf auth login"),
    (Fault(status=401, code="GatedRepo"), "is gated", "accept them at"),
    (Fault(status=403), "denies access (HTTP 403)", "terms"),
    (Fault(status=404, code="RepoNotFound"), "has no repository", "check the name"),
    (Fault(status=404, code="RevisionNotFound"), "has no revision main", "revision"),
    (Fault(status=429), "limits requests from here (HTTP 429)", "wait"),
    (Fault(status=500), "fault of its own (HTTP 500)", "later"),
    (Fault(status=503), "fault of its own (HTTP 503)", "later"),
    (Fault("cdn", status=416), "could not continue a download (HTTP 416)", "again"),
    (Fault("cdn", status=403), "denies access (HTTP 403)", "terms"),
    (Fault("cdn", status=500), "fault of its own (HTTP 500)", "later"),
    (Fault("cdn", body="short"), "another size than announced", "again"),
    (Fault("cdn", body="cut"), "connection to the Hub failed", "again"),
]


@pytest.mark.parametrize(("fault", "words", "hint"), STATUSES, ids=lambda v: getattr(v, "code", "")[:20])
def test_every_fault_of_the_hub_is_told_in_one_line_and_leaves_nothing(
    hub: Hub, child: Child, repo: str, fault: Fault, words: str, hint: str
):
    hub.add(repo, FILE, fault)
    found = child.fetch(f"{repo}:model.safetensors")
    assert (found["kind"], found["exit_code"]) == ("hub", 4)
    assert words in found["error"]
    assert hint in found["hint"]
    assert "\n" not in found["error"] + found["hint"]
    assert child.blobs(repo) == []
    hub.repos[repo].faults.clear()
    assert Path(child.fetch(f"{repo}:model.safetensors")["path"]).read_bytes() == CONTENT


VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "9" * 30, "null", "main", "../..", "/etc/passwd", "http://[", "f" * 40, "%00", '""']
    ),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size", "Location"]), VALUES, min_size=1
    )
)
def test_whatever_the_hub_says_of_a_file_the_file_is_right_or_refused(
    hub: Hub, child: Child, odd: dict[str, str]
):
    """A proxy may answer anything: no crash, no file outside the cache, no other bytes than the declared ones."""
    repo = "owner/odd-" + hashlib.sha1(json.dumps(odd, sort_keys=True).encode()).hexdigest()[:12]
    hub.add(repo, FILE).odd = odd
    found = child.fetch(f"{repo}:model.safetensors", sha256=SHA256)
    if "error" in found:
        assert (found["kind"], found["exit_code"]) == ("hub", 4)
        assert "\n" not in found["error"] + (found["hint"] or "")
    else:
        path = Path(found["path"])
        assert path.read_bytes() == CONTENT
        assert path.resolve().is_relative_to(child.cache.resolve())


@pytest.mark.parametrize(
    "fault", [Fault(status=500, times=2), Fault("cdn", body="cut", times=1)], ids=["500", "cut"]
)
def test_a_fault_that_passes_is_not_the_users_business(hub: Hub, child: Child, repo: str, fault: Fault):
    hub.add(repo, FILE, fault)
    assert Path(child.fetch(repo)["path"]).read_bytes() == CONTENT


def test_a_cut_download_goes_on_where_it_was(hub: Hub, child: Child, repo: str):
    hub.add(repo, {"model.safetensors": LARGE}, Fault("cdn", body="cut", times=1))
    assert Path(child.fetch(repo)["path"]).read_bytes() == LARGE
    ranges = [r.headers.get("range") for r in hub.seen(repo) if r.origin == "cdn" and r.method == "GET"]
    assert ranges == [None, f"bytes={CHUNK}-"]


def test_a_process_killed_in_a_download_leaves_nothing_that_harms(hub: Hub, tmp_path: Path, repo: str):
    hub.add(repo, {"model.safetensors": LARGE}, Fault("cdn", body="stall", times=1))
    killed = Child(tmp_path, hub.url)
    killed.ask(repo)
    half = killed.cache / f"models--{repo.replace('/', '--')}" / "blobs"
    until = time.monotonic() + 60
    while not any(blob.stat().st_size >= CHUNK for blob in half.glob("*")):
        assert time.monotonic() < until, "no half of the file arrived"
        time.sleep(0.01)
    killed.process.kill()
    killed.close()
    hub.go_on.set()
    after = Child(tmp_path, hub.url)
    assert "not on this machine" in after.fetch(repo, offline=True)["error"]
    assert Path(after.fetch(repo)["path"]).read_bytes() == LARGE
    after.close()


def test_three_processes_at_once_fetch_a_file_once(hub: Hub, tmp_path: Path, repo: str):
    hub.add(repo, {"model.safetensors": LARGE})
    children = [Child(tmp_path, hub.url) for _ in range(3)]
    for child in children:
        child.ask(repo)
    found = [child.answer() for child in children]
    for child in children:
        child.close()
    assert {one["sha256"] for one in found} == {hashlib.sha256(LARGE).hexdigest()}
    assert Path(found[0]["path"]).read_bytes() == LARGE
    assert sum(r.origin == "cdn" and r.method == "GET" for r in hub.seen(repo)) == 1


def test_a_repository_without_the_file_says_so(hub: Hub, child: Child, repo: str):
    hub.add(repo, {"README.json": b"{}"})
    assert "has no file weights.safetensors" in child.fetch(f"{repo}:weights.safetensors")["error"]
    assert "holds none of model.safetensors" in child.fetch(repo)["error"]


def test_a_revision_that_is_not_there_says_so(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    assert f"has no revision {'a' * 40}" in child.fetch(f"{repo}@{'a' * 40}")["error"]


def test_large_models_come_in_parts_and_each_is_checked(hub: Hub, child: Child, repo: str):
    parts = {"a.safetensors": CONTENT, "b.safetensors": CONTENT + b"b"}
    index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}).encode()
    hub.add(repo, {"model.safetensors.index.json": index, **parts})
    path = Path(child.fetch(repo)["path"])
    assert {p.name: p.read_bytes() for p in path.parent.glob("?.safetensors")} == parts


@pytest.mark.parametrize("part", ["../up.safetensors", "/etc/passwd", "sub/a.safetensors", ""])
def test_an_index_that_leads_out_of_its_folder_is_refused(hub: Hub, child: Child, part: str):
    repo = f"owner/index{len(part)}"
    hub.add(repo, {"model.safetensors.index.json": json.dumps({"weight_map": {"x": part}}).encode()})
    found = child.fetch(repo)
    assert (found["kind"], found["exit_code"]) == ("checkpoint", 4)
    assert "outside its folder" in found["error"]


def test_offline_asks_nobody(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    found = child.fetch(repo, offline=True)
    assert "is not on this machine, and this is offline" in found["error"]
    assert "detr zoo pull" in found["hint"]
    assert hub.seen(repo) == []


def test_a_full_disk_is_named_and_leaves_nothing(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    found = child.fetch(f"{repo}:model.safetensors", limit=4096)
    assert "cannot be" in found["error"]
    assert "free some space" in found["hint"]
    assert child.blobs(repo) == []
    assert "path" in child.fetch(repo)


def test_foreign_and_half_files_in_the_cache_do_no_harm(hub: Hub, child: Child, repo: str):
    commit = hub.add(repo, FILE).commit
    folder = child.cache / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / f"{SHA256}.incomplete").write_bytes(CONTENT[:100])
    (folder / "snapshots" / commit / "notes").mkdir(parents=True)
    (folder / "snapshots" / commit / "model.safetensors").symlink_to(folder / "nowhere")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("../../no commit")
    assert Path(child.fetch(repo)["path"]).read_bytes() == CONTENT


def test_a_cache_that_the_client_cannot_read_is_told_with_the_way_out(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    refs = child.cache / f"models--{repo.replace('/', '--')}" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(b"\xff\xfe")
    found = child.fetch(repo)
    assert "the Hub client failed: UnicodeDecodeError" in found["error"]
    assert f"detr zoo rm {repo}" in found["hint"]


def test_records_that_cannot_be_read_count_as_none(hub: Hub, child: Child, repo: str):
    hub.add(repo, FILE)
    child.fetch(repo)
    for record in (child.home / "hub" / repo.replace("/", "--")).iterdir():
        record.write_text('{"repo": 3')
    assert child.fetch(repo)["first_use"] is True


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path, repo: str):
    hub.add(repo, FILE)
    tmp_path.chmod(0o555)
    child = Child.__new__(Child)
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf").chmod(0o555)
    Child.__init__(child, tmp_path, hub.url)
    found = child.fetch(f"{repo}:model.safetensors", nobody=True)
    tmp_path.chmod(0o755)
    (tmp_path / "hf").chmod(0o755)
    child.close()
    assert "cannot be" in found["error"]
    assert "HF_HOME" in found["hint"]


def test_no_server_and_the_clients_own_offline_switch(hub: Hub, tmp_path: Path, repo: str):
    hub.add(repo, FILE)
    (tmp_path / "a").mkdir()
    lost = Child(tmp_path / "a", "http://127.0.0.1:9")
    found = lost.fetch(repo)
    lost.close()
    assert "connection to the Hub failed" in found["error"]
    (tmp_path / "b").mkdir()
    offline = Child(tmp_path / "b", hub.url, HF_HUB_OFFLINE="1")
    assert "offline" in offline.fetch(repo)["error"]
    offline.close()
    assert hub.seen(repo) == []


def test_nothing_ever_said_holds_the_token(hub: Hub, child: Child):
    """Runs last in this file: all faults above happened in this process."""
    assert TOKEN not in child.said()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_the_file_that_was_used_first_stays_the_one_that_is_meant(
    hub: Hub, child: Child, repo: str, name: str
):
    hub.add(repo, {name: CONTENT})
    assert child.fetch(repo)["sha256"] == SHA256
    hub.push(repo, {name: CONTENT, "model.safetensors": b"another"})
    before = len(hub.seen(repo))
    for offline in (False, True):
        again = child.fetch(repo, offline=offline)
        assert (again["sha256"], Path(again["path"]).name) == (SHA256, name)
    assert len(hub.seen(repo)) == before


@pytest.mark.parametrize("held", [{}, {"config.json": b"{}"}], ids=["absent", "there"])
def test_what_lies_beside_the_weights_is_asked_for_once(
    hub: Hub, child: Child, repo: str, held: dict[str, bytes]
):
    hub.add(repo, FILE | held)
    child.fetch(repo)
    first = child.fetch(repo, beside="config.json")["path"]
    assert (first and Path(first).read_bytes()) == held.get("config.json")
    before = len(hub.seen(repo))
    for offline in (False, True):
        assert child.fetch(repo, beside="config.json", offline=offline)["path"] == first
    assert len(hub.seen(repo)) == before
