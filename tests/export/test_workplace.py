"""The hidden folder of an export is gone afterwards, however the process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from detrcli.export.workplace import LOCK, SUFFIX, parts, workplace
from tests.tiny import write_run

# exports, and says on stdout when the file is written and not yet looked at
SLOW = """
import signal, time, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what it starts in the background
from detrcli.cli import main
from detrcli.export import run
write = run.WRITERS["pt2"]
def slow(path, *rest):
    write(path, *rest)
    print("written", flush=True)
    if "wait" in sys.argv[-1]:
        time.sleep(60)
run.WRITERS["pt2"] = slow
main()
"""


def started(folder):
    weights = write_run(folder / "run") / "best.safetensors"
    out = folder / "out" / "wait.pt2"
    command = [sys.executable, "-c", SLOW, "export", "--weights", str(weights), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert [path.name[:10] for path in out.parent.iterdir()] == [".wait.pt2."]
    return process, out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(number, code, tmp_path):
    process, out = started(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert list(out.parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    process, out = started(tmp_path)
    with workplace(out) as second:
        assert len(list(out.parent.iterdir())) == 2, "another process is at work there"
    process.kill()
    process.communicate()
    others = [out.parent / f".wait.pt2.mine{SUFFIX}", out.parent / f".other.pt2.x{SUFFIX}"]
    for folder in others:
        folder.mkdir()
    (others[1] / LOCK).touch()
    (out.parent / ".wait.pt2.file").touch()
    assert not second.exists()
    with workplace(out) as folder:
        kept = {path.name for path in out.parent.iterdir()}
        assert kept == {folder.name, others[0].name, others[1].name, ".wait.pt2.file"}
        (folder / "wait.bin").touch()
        (folder / "wait.pt2").touch()
        assert [path.name for path in parts(folder, out)] == ["wait.bin", "wait.pt2"]


def test_a_signal_that_somebody_else_handles_stays_theirs(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with workplace(tmp_path / "a.pt2"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_thread_may_export_too(tmp_path):
    done = []

    def work():
        with workplace(tmp_path / "a.pt2") as folder:
            done.append(folder.is_dir())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
    assert list(tmp_path.iterdir()) == []
