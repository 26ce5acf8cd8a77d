"""PyTorch's own files: read where they are plain weights, named and refused where they could run code."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import runpy
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detrcli.errors import CheckpointError
from detrcli.weights.file import load

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.zeros(2)}


class Gadget:
    """A pickle that calls something when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def gadgets(canary: Path) -> dict[str, Callable[[Path], None]]:
    touch = Gadget(os.system, f"touch {canary}")
    evaluate = Gadget(builtins.eval, f"open({str(canary)!r}, 'w')")
    return {
        "os.system": lambda p: torch.save({"model": touch}, p),
        "builtins.eval": lambda p: torch.save({"model": {"a": evaluate}}, p),
        "builtins.exec": lambda p: torch.save([Gadget(builtins.exec, f"open({str(canary)!r}, 'w')")], p),
        "as a key": lambda p: torch.save(OrderedDict([(("x", evaluate), 1)]), p),
        "nested": lambda p: torch.save({"args": Gadget(getattr, evaluate, "close")}, p),
        "runpy": lambda p: torch.save(Gadget(runpy.run_path, "/dev/null"), p),
        "legacy": lambda p: torch.save({"model": touch}, p, _use_new_zipfile_serialization=False),
        "bare pickle": lambda p: p.write_bytes(pickle.dumps(touch)),
        "old tar": lambda p: _tar(p, pickle.dumps(touch)),
        "joined to weights": lambda p: torch.save({**WEIGHTS, "hook": touch}, p),
    }


def _tar(path: Path, content: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("name", list(gadgets(Path())))
@pytest.mark.parametrize("namespace", [False, True])
@pytest.mark.filterwarnings("ignore:'torch.load' received a zip")
def test_no_pickle_runs_code(tmp_path: Path, name: str, namespace: bool):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    gadgets(canary)[name](path)
    with pytest.raises(CheckpointError) as refused:
        load(path, namespace=namespace)
    assert not canary.exists()
    assert str(path) in refused.value.message
    if name in ("os.system", "builtins.eval", "builtins.exec"):
        wanted = "posix.system" if name == "os.system" else name.replace("builtins", "__builtin__")
        assert wanted in refused.value.message or name in refused.value.message


def test_the_gadgets_would_work_elsewhere(tmp_path: Path):
    """The test above has teeth: an unsafe reader does run them."""
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    gadgets(canary)["bare pickle"](path)
    pickle.loads(path.read_bytes())
    assert canary.exists()


@pytest.mark.parametrize(
    "nest", [lambda w: w, lambda w: {"model": w, "epoch": 3}, lambda w: {"state_dict": w}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_are_read_wherever_they_lie(tmp_path: Path, nest: Callable[[Any], Any], zipped: bool):
    torch.save(nest(WEIGHTS), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    tensors, metadata = load(tmp_path / "w.pth")
    assert metadata is None
    assert all(torch.equal(tensors[name], value) for name, value in WEIGHTS.items())


def test_arguments_of_the_papers_programs_are_read_only_to_convert(tmp_path: Path):
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="arguments of the program") as refused:
        load(tmp_path / "w.pth")
    assert "detr zoo convert" in (refused.value.hint or "")
    assert load(tmp_path / "w.pth", namespace=True)[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize("content", [[], {}, {"epoch": 3}, torch.zeros(3), {"model": {"a": 1}}])
def test_files_without_weights_say_so(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_file_is_told_as_cut(tmp_path: Path, keep: float):
    path = tmp_path / "w.pth"
    torch.save(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"cut short or damaged|empty"):
        load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "starts like neither"),
        (b"\x89PNG\r\n\x1a\n", "starts like neither"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "w.pth")


def test_any_zip_is_not_a_checkpoint(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(tmp_path / "w.pth")


def test_paths_that_are_no_files(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)


def test_a_flipped_bit_is_told_by_the_checksum_of_its_record(tmp_path: Path) -> None:
    torch.save(WEIGHTS, path := tmp_path / "x.pth")
    whole = path.read_bytes()
    place = whole.index(WEIGHTS["a.weight"].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(path)
