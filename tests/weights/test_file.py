from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from detrcli.errors import CheckpointError
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories
from detrcli.weights.file import load, save
from detrcli.weights.metadata import Metadata, read_metadata

METADATA = Metadata(
    model="detr/tiny",
    num_classes=2,
    config={"width": 64, "backbone": {"name": "test_resnet", "levels": [3]}},
    preprocess=Preprocess(short_side=64),
    categories=Categories((1, 7), ("cat", "dog")),
    made={"ap": 0.5, "command": "detr train"},
)


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3),
        "b.half": torch.randn(4).bfloat16(),
        "c.count": torch.tensor(7),
        "d.none": torch.empty(0, 4),
        "e.mask": torch.tensor([True, False]),
    }


def test_tensors_and_description_return_as_they_were(tmp_path: Path):
    path = tmp_path / "deep" / "model.safetensors"
    save(path, state(), METADATA)
    tensors, metadata = load(path)
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in state().items()}
    assert all(torch.equal(tensors[n], t) for n, t in state().items())
    assert metadata is not None
    assert (metadata.categories, metadata.preprocess, metadata.config, metadata.made) == (
        METADATA.categories,
        METADATA.preprocess,
        METADATA.config,
        METADATA.made,
    )
    assert read_metadata(path) == metadata


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_a_file_is_ours_whatever_its_length_looks_like(tmp_path: Path, first: int):
    """The first byte is the low one of a length: 0x80 opens a pickle too, and a zip opens with 0x50."""
    path = tmp_path / "x.safetensors"
    for padding in range(0, 300, 4):
        described = replace(METADATA, made={"padding": "x" * padding})
        save(path, state(), described)
        if path.read_bytes()[0] == first:
            break
    assert path.read_bytes()[0] == first
    _, metadata = load(path)
    assert metadata is not None
    assert metadata.made == described.made


def test_shared_tensors_are_stored_once_and_return_under_every_name(tmp_path: Path):
    linear = nn.Linear(300, 300)
    model = nn.ModuleDict({"first": linear, "second": linear})
    path = tmp_path / "m.safetensors"
    save(path, model.state_dict(), METADATA)
    assert path.stat().st_size < 1.1 * 300 * 301 * 4
    tensors, _ = load(path)
    assert torch.equal(tensors["second.weight"], linear.weight)
    assert tensors.keys() == model.state_dict().keys()


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path: Path):
    save(tmp_path / "a", state(), METADATA)
    for _ in range(8):  # a random order would show in one of them
        save(tmp_path / "b", dict(reversed(state().items())), METADATA)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.safetensors"
    save(path, state(), METADATA)
    return path.read_bytes()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_single_flipped_bit_passes(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(broken)
    try:
        tensors, _ = load(path)
    except CheckpointError:
        return
    # it may still load where the flip changed nothing: padding of the header, or the key that makes the file one of ours
    assert tensors.keys() == state().keys()
    assert all(torch.equal(tensors[n], t) for n, t in state().items())


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_whatever_a_file_holds_the_error_is_ours(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    """Cut, spliced, lengthened, with another header length, or with a header of arbitrary JSON."""
    kind = data.draw(st.sampled_from(["cut", "splice", "length", "header", "noise"]))
    if kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "splice":
        at = data.draw(st.integers(0, len(whole)))
        content = whole[:at] + data.draw(st.binary(min_size=1, max_size=40)) + whole[at:]
    elif kind == "length":
        content = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + whole[8:]
    elif kind == "header":
        entry = st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I64", "BF16", "Q9", "", 3]),
                "shape": st.lists(st.integers(-1, 2**62), max_size=4),
                "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3),
            }
        )
        table = data.draw(st.dictionaries(st.text(max_size=5), st.one_of(entry, st.none(), st.integers())))
        header = json.dumps(
            table | {"__metadata__": data.draw(st.sampled_from([{}, {"detrcli": "{}"}, 3]))}
        ).encode()
        content = struct.pack("<Q", len(header)) + header + whole[-200:]
    else:
        content = data.draw(st.binary(max_size=300))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    for read in (load, read_metadata):
        with contextlib.suppress(CheckpointError):
            read(path)
