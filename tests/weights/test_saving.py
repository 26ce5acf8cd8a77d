"""A checkpoint that cannot be written leaves the one that was there."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from detrcli.errors import DetrError
from detrcli.files import replacing
from detrcli.weights.convert import to_layout
from detrcli.weights.file import load, save
from detrcli.weights.metadata import Metadata
from tests.tiny import write_run

METADATA = Metadata(model="detr/tiny", num_classes=2)
OLD = {"w": torch.zeros(1000)}
NEW = {"w": torch.ones(100_000)}


@contextmanager
def no_space_beyond(size: int) -> Iterator[None]:
    """Writes past `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "last.safetensors"
    save(path, OLD, METADATA)
    with (
        no_space_beyond(50_000),
        pytest.raises(DetrError, match=r"cannot write .*last\.safetensors") as error,
    ):
        save(path, NEW, METADATA)
    assert "unchanged" in (error.value.hint or "")
    assert torch.equal(load(path)[0]["w"], OLD["w"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failure_at_any_step_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    path = tmp_path / "last.safetensors"
    save(path, OLD, METADATA)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DetrError, match="No space left on device"):
        save(path, NEW, METADATA)
    monkeypatch.undo()
    assert torch.equal(load(path)[0]["w"], OLD["w"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("layout", "out"), [("official", "x.pth"), ("hub", "x.safetensors")])
def test_a_conversion_that_does_not_fit_is_told_and_leaves_nothing(tmp_path: Path, layout: str, out: str):
    run = write_run(tmp_path / "run")
    with no_space_beyond(20_000), pytest.raises(DetrError, match=rf"cannot write .*{out}: ") as caught:
        to_layout(run / "best.safetensors", tmp_path / out, layout)
    assert caught.value.exit_code == 1
    assert "enforce" not in caught.value.message
    assert list(tmp_path.iterdir()) == [run]


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DetrError, match="cannot write"):
        save(tmp_path / "file" / "x.safetensors", NEW, METADATA)


def test_a_user_without_permission_is_told_so(tmp_path: Path):
    tmp_path.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(DetrError, match="Permission denied"), replacing(tmp_path / "x"):
            pass
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        tmp_path.chmod(0o755)


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path):
    """kill -9 between the write and the rename, in a process of its own."""
    path = tmp_path / "last.safetensors"
    save(path, OLD, METADATA)
    script = f"""
        import os
        from pathlib import Path
        from detrcli.files import replacing
        with replacing(Path({str(path)!r})) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -9
    assert torch.equal(load(path)[0]["w"], OLD["w"])


def test_files_get_the_rights_that_new_files_get(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
