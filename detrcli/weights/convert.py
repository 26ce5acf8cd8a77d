"""Other people's checkpoints to our files, and ours to their layouts; total, or an error that lists what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detrcli.config import from_plain, to_plain
from detrcli.data.coco_classes import classes_for
from detrcli.errors import CheckpointError, UsageError, typed, unknown
from detrcli.files import replacing
from detrcli.plugins import models, resolve
from detrcli.plugins.registry import Model, fold
from detrcli.version import __version__
from detrcli.weights import file, keymap
from detrcli.weights.fingerprint import fingerprint
from detrcli.weights.ledger import sha256_of
from detrcli.weights.load import NATIVE, LoadReport, classes_of_others, count_classes, fit, load_state
from detrcli.weights.metadata import Metadata
from detrcli.weights.resolve import is_family

FOREIGN = (".pth", ".pt", ".bin")


@dataclass(frozen=True, slots=True)
class Converted:
    path: Path
    model: str
    num_classes: int
    report: LoadReport


def to_native(source: Path, out: Path, model: str | None = None) -> Converted:
    """Write `source`, in any layout that a family knows, as a file of ours that needs no other."""
    if out.suffix in FOREIGN:
        raise UsageError(
            f"{out}: our files are safetensors, whatever their name", hint="name it .safetensors"
        )
    tensors, said = file.load(source, namespace=True)
    if said is not None:
        raise UsageError(
            f"{source} is a file of ours already ({said.model})",
            hint="to write another layout from it: --to LAYOUT",
        )
    chosen = _only_fit(tensors, source, _candidates(model))
    with torch.device("meta"):
        blank = chosen.build()
    count = count_classes(tensors, chosen.family, chosen.config, chosen.variant.num_classes, blank)
    module = chosen.build(count)
    report = load_state(module, tensors, chosen.family, chosen.config, source=str(source))
    metadata = Metadata(
        model=chosen.name,
        num_classes=count,
        config=to_plain(chosen.config),
        preprocess=chosen.variant.preprocess,
        categories=classes_of_others(source, count) or classes_for(count),
        made={
            "converted_from": {"file": source.name, "sha256": sha256_of(source), "layout": report.layout},
            "detrcli": __version__,
            "fingerprint": fingerprint(module, chosen.variant.preprocess),
        },
    )
    file.save(out, module.state_dict(), metadata)
    return Converted(out, chosen.name, count, report)


def to_layout(source: Path, out: Path, layout: str) -> Converted:
    """Write one of our files under the names of another layout: `.pth` as the papers' programs read it, or safetensors."""
    tensors, said = file.load(source)
    if said is None:
        raise UsageError(
            f"{source} is not a file of ours", hint=f"first: {typed('detr', 'zoo', 'convert', source)}"
        )
    model = resolve(said.model)
    if layout not in model.family.key_maps:
        raise unknown(f"layout of {model.family.name}:", layout, model.family.key_maps)
    config = from_plain(type(model.config), said.config)
    names = keymap.revert(model.family.key_maps[layout](config), tensors)
    _check_way_back(names, tensors, model.configured(config), layout)
    with replacing(out) as temporary:
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            try:
                save_file({n: t.contiguous() for n, t in names.items()}, temporary, metadata={"format": "pt"})
            except Exception as error:  # its own error for a full disk, whose text holds the cause
                raise OSError(f"{error}") from error
        else:
            file.save_torch(temporary, {"model": names})
    return Converted(out, model.name, said.num_classes, LoadReport(layout, tuple(names)))


def _check_way_back(names: dict[str, Tensor], ours: dict[str, Tensor], model: Model, layout: str) -> None:
    """What was written is what would be read."""
    again = keymap.apply(model.family.key_maps[layout](model.config), names).tensors
    if again.keys() != ours.keys() or not all(torch.equal(again[n], ours[n]) for n in ours):
        raise CheckpointError(
            f"the layout {layout} of {model.family.name} cannot be written from this file",
            hint="its key map does not lead back: report it to the plugin",
        )


def _candidates(model: str | None) -> list[Model]:
    """The variants that the user leaves open."""
    if model is None:
        return models()
    chosen = resolve(model)
    if not is_family(model):
        return [chosen]
    return [m for m in models() if fold(m.family.name) == fold(chosen.family.name)]


def _only_fit(tensors: dict[str, Tensor], source: Path, candidates: Sequence[Model]) -> Model:
    """The one candidate whose tensors the file holds; several that do not differ in their tensors must be told apart by name."""
    if len(candidates) == 1:
        return candidates[0]
    failed: dict[str, str] = {}
    fits = [model for model in candidates if _fits(tensors, model, failed)]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise CheckpointError(
            f"{source} fits none of {len(candidates)} models"
            + "".join(f"; {name} could not be tried: {why}" for name, why in failed.items()),
            hint="name the one it should be: --model FAMILY/VARIANT",
        )
    raise UsageError(
        f"{source} fits {', '.join(m.name for m in fits)}, which have the same tensors; the file cannot tell",
        hint=f"name the row of the table it was trained as: --model {fits[0].name}",
    )


def _fits(tensors: dict[str, Tensor], model: Model, failed: dict[str, str]) -> bool:
    """Whether the file is of this model; one that cannot be tried goes into `failed`, for it may be of no concern to the file."""
    try:
        with torch.device("meta"):
            blank: nn.Module = model.build()
        report = fit(tensors, model.family, model.config, blank)
    except Exception as error:  # a plugin's code may fail in any way
        failed[model.name] = f"{type(error).__name__}: {error}"
        return False
    return report.layout != NATIVE and not report.missing and not report.unexpected and report.only_rows
