"""Weights files: safetensors with a hash of our own inside, written whole or not at all; PyTorch's pickles read safely.

safetensors has no checksum: a file with a flipped bit loads. `save` therefore writes a sha256 over names, types, shapes, bytes
and the description into the metadata, and `load` compares. Files of others carry no such hash; theirs comes from the Hub.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrcli.errors import CheckpointError, typed
from detrcli.files import replacing
from detrcli.weights.metadata import (
    KEY,
    SHARD_INDEX,
    Metadata,
    cannot_read,
    damaged,
    parse,
    read_header,
    shard_names,
    sniff,
)

_PIECE = 1 << 20  # bytes read at a time


def save(path: Path, state: Mapping[str, Tensor], metadata: Metadata) -> Metadata:
    """Write tensors and description; what was at `path` stays until the new file is whole."""
    from safetensors.torch import save_file

    tensors, aliases = _unshare(state)
    metadata = replace(metadata, aliases=aliases)
    metadata = replace(metadata, sha256=digest(tensors, metadata))
    with replacing(path) as temporary:
        try:
            # one key: safetensors writes several in random order, and equal content should be equal bytes
            save_file(tensors, temporary, metadata={KEY: metadata.dumps()})
        except Exception as error:  # safetensors has its own error for a full disk; its text holds the cause
            raise OSError(f"{error}") from error
    return metadata


def save_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write as torch does, whose writer has no OSError for a full disk, and no words for it."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError("the disk did not take all of it, and may be full") from error


def load(path: Path, *, namespace: bool = False) -> tuple[dict[str, Tensor], Metadata | None]:
    """The tensors of a weights file, of whatever kind, on the CPU; with the description if it is one of ours.

    `namespace` also accepts the command-line arguments that the papers' own programs stored in their checkpoints.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a weights file")
    if path.name.endswith(SHARD_INDEX):
        return _load_shards(path), None
    kind = sniff(path)
    if kind == "pickle":
        return _load_pickle(path, namespace), None
    if kind != "safetensors":
        raise CheckpointError(
            f"{path} is not a weights file: {kind}", hint="give a .safetensors or .pth file"
        )
    tensors = _load_safetensors(path)
    text = read_header(path).get("__metadata__", {}).get(KEY)
    if not isinstance(text, str):
        return tensors, None
    metadata = parse(text, path)
    if digest(tensors, metadata) != metadata.sha256:
        raise CheckpointError(
            f"{path} is damaged: its content does not match the sha256 it was saved with",
            hint="copy or download it again; `last.safetensors` of the run may be whole",
        )
    return _restore_aliases(tensors, metadata, path), metadata


def digest(tensors: Mapping[str, Tensor], metadata: Metadata) -> str:
    """sha256 over the description and every tensor in the order of names."""
    seen = hashlib.sha256(metadata.unsigned().encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        seen.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            seen.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    except Exception as error:  # a foreign parser on a foreign file: whatever it meets is the file's fault
        raise damaged(path, f"{error}") from error


def _load_shards(index: Path) -> dict[str, Tensor]:
    """A model cut into several files, listed by an index beside them."""
    tensors: dict[str, Tensor] = {}
    for name in shard_names(index):
        tensors |= _load_safetensors(index.parent / name)
    listed = set(json.loads(index.read_text())["weight_map"])
    if absent := sorted(listed - tensors.keys()):
        raise damaged(index, f"{len(absent)} tensors of the index are in no part, such as {absent[0]}")
    return tensors


def _load_pickle(path: Path, namespace: bool) -> dict[str, Tensor]:
    """A `.pth` or `.bin`; only tensors and plain containers are ever built, no code of the file runs."""
    import argparse
    import pickle

    _check_records(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace] if namespace else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from error
    except OSError as error:
        raise cannot_read(path, error) from error
    except Exception as error:  # as above: torch answers a damaged file with many kinds of errors
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch file: it is cut short or damaged",
            hint="copy or download it again",
        ) from error
    return _state_of(content, path)


def _check_records(path: Path) -> None:
    """Compare the records of a zip file with their checksums, which torch does not; 0 where torch was told to write none."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            for record in filter(lambda record: record.CRC, archive.infolist()):
                with archive.open(record) as content:
                    while content.read(_PIECE):
                        pass
    except OSError as error:
        raise cannot_read(path, error) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="copy or download it again") from error


def _state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which may lie under `model` or `state_dict`."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights, but a {type(content).__name__}")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path} holds no plain weights: {odd[0]!r} is not a tensor")
    return {str(name): value for name, value in content.items()}


def _unsafe(path: Path, error: Exception) -> CheckpointError:
    """Name what the pickle wanted to call."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only zip files can be looked into; the refusal stands either way
        wanted = []
    if wanted == ["argparse.Namespace"]:
        return CheckpointError(
            f"{path} also holds the arguments of the program that wrote it",
            hint=f"convert it once: {typed('detr', 'zoo', 'convert', path, '--model', 'FAMILY/VARIANT')}",
        )
    names = f"it asks for {', '.join(wanted)}" if wanted else "it asks for more than tensors"
    return CheckpointError(
        f"{path} is refused: {names}; loading it could run code",
        hint="get the weights as safetensors from a source you trust",
    )


def _unshare(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the second names of shared ones."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            tensors[name] = tensor.detach().cpu().contiguous()
        else:
            aliases[name] = owner
    return tensors, aliases


def _restore_aliases(tensors: dict[str, Tensor], metadata: Metadata, path: Path) -> dict[str, Tensor]:
    try:
        return tensors | {alias: tensors[name] for alias, name in metadata.aliases.items()}
    except KeyError as error:
        raise damaged(path, f"a shared tensor is missing: {error}") from error
