"""What a model answers: shapes, padding, neighbours, and the same as it did; on the small variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Any, cast, get_args, get_origin, get_type_hints
from unittest import SkipTest

import torch
from torch import Tensor, nn

from detrcli import ops
from detrcli.config import assign
from detrcli.errors import UsageError
from detrcli.nn.backbone import resize_mask
from detrcli.plugins import Model
from detrcli.testing.golden import answers, keys, stored, waved
from detrcli.testing.samples import CLASSES, SMALL, pictures, run_small
from detrcli.types import Output
from detrcli.weights.fingerprint import differs

STILL = "in eval mode the same pictures give two answers: dropout or noise is left on"
NEIGHBOURS = "a picture's answer depends on its place in the batch: something mixes pictures, such as a norm over the batch"
MASKED = "hide masked tokens from attention, and set their values to zero where they are sampled"


def outputs_have_their_shapes(model: Model) -> None:
    for module in run_small(model):
        images, mask = pictures()
        with torch.no_grad():
            output = module(images, mask)
        _check_output(output, len(images))
        for layer in output.aux:
            _check_output(layer, len(images))
            assert layer.boxes.shape == output.boxes.shape, (
                "auxiliary layers answer for the same queries as the last"
            )


def sizes_have_bounds(model: Model) -> None:
    """None, or fewer, of anything that is counted is either meant, or refused with the setting named."""
    if model.variant.params > SMALL:
        return
    for path in _whole_numbers(type(model.config)):
        for value in (0, -1):
            changed = _set(model, path, value)
            if isinstance(changed, Model):
                _answers(changed, f"{path}={value}")
            else:
                assert path.rpartition(".")[2] in changed, (
                    f"{path}={value} is refused without its name: {changed}"
                )


def _set(model: Model, path: str, value: int) -> Model | str:
    """The model with a setting changed, or why it is refused."""
    try:
        return model.configured(assign(model.config, {path: value}))
    except UsageError as refusal:
        return str(refusal)


def _answers(model: Model, setting: str) -> None:
    images, mask = pictures()
    try:
        for module in run_small(model):
            with torch.no_grad():
                output = module(images, mask)
            model.family.postprocess(model.config, output, torch.tensor([[96, 128], [64, 96]]))
    except Exception as error:
        raise AssertionError(
            f"{model.name} takes {setting} and breaks ({type(error).__name__}: {error}): call at_least in __post_init__"
        ) from error


def _whole_numbers(kind: type, prefix: str = "") -> Iterator[str]:
    """The paths of a configuration that hold whole numbers, None beside them or not."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _whole_numbers(cast(type, hint), f"{prefix}{name}.")
        elif int in (hint, *get_args(hint)) and get_origin(hint) is not tuple:
            yield prefix + name


def _check_output(output: Output, batch: int) -> None:
    queries = output.logits.shape[1]
    assert output.logits.shape[:2] == (batch, queries), (
        f"logits are {tuple(output.logits.shape)}, not (B, Q, K)"
    )
    assert output.logits.shape[2] in (CLASSES, CLASSES + 1), (
        f"logits have {output.logits.shape[2]} channels for {CLASSES} classes: one a class, and at most one for no object"
    )
    assert output.boxes.shape == (batch, queries, 4), f"boxes are {tuple(output.boxes.shape)}, not (B, Q, 4)"
    for name, value in (("logits", output.logits), ("boxes", output.boxes)):
        assert value.dtype == torch.float32, f"{name} of a float32 picture are {value.dtype}, not float32"
    assert torch.isfinite(output.logits).all(), "logits of an untrained model are not finite"
    assert ((output.boxes >= 0) & (output.boxes <= 1)).all(), (
        "boxes leave [0, 1]: they are cxcywh, parts of the picture without its padding; end with a sigmoid"
    )


def evaluation_is_deterministic(model: Model) -> None:
    for module in run_small(model):
        images, mask = pictures()
        with torch.no_grad():
            first, second = module(images, mask), module(images, mask)
        assert torch.equal(first.logits, second.logits), STILL
        assert torch.equal(first.boxes, second.boxes), STILL


def pictures_do_not_see_each_other(model: Model) -> None:
    for module in run_small(model):
        images, mask = pictures()
        with torch.no_grad():
            straight, swapped = module(images, mask), module(images.flip(0), mask.flip(0))
        assert torch.allclose(straight.logits, swapped.logits.flip(0), atol=1e-4), NEIGHBOURS
        assert torch.allclose(straight.boxes, swapped.boxes.flip(0), atol=1e-4), NEIGHBOURS


def no_mask_means_no_padding(model: Model) -> None:
    for module in run_small(model):
        images, _ = pictures()
        with torch.no_grad():
            without = module(images)
            empty = module(images, torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool))
        assert torch.allclose(without.logits, empty.logits, atol=1e-5), (
            "model(images) must be model(images, mask) with nothing padded: make the mask where it is None"
        )


def padding_is_never_read(model: Model) -> None:
    """Whatever stands in the padding of the maps or tokens, the transformer does not see it. Convolutions before that may."""
    family = model.family
    assert bool(family.masked_after) != bool(family.reads_padding), (
        f"{family.name}: say masked_after=MODULE, behind which padding is not read, or reads_padding=WHY it is"
    )
    for module in run_small(model) if family.masked_after else ():
        images, mask = pictures()
        waved(module)
        with torch.no_grad():
            clean = module(images, mask)
            handle = module.get_submodule(family.masked_after).register_forward_hook(partial(_hook, mask))
            spoilt = module(images, mask)
            handle.remove()
        assert torch.allclose(clean.logits, spoilt.logits, atol=1e-4), (
            f"what stands in the padding changes the classes: {MASKED}"
        )
        assert torch.allclose(clean.boxes, spoilt.boxes, atol=1e-4), (
            f"what stands in the padding changes the boxes: {MASKED}"
        )


def _hook(mask: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return _spoilt(output, mask)


def _spoilt(value: Any, mask: Tensor) -> Any:
    """The same with 1e4 on all padding: maps (B, C, H, W), alone or beside their masks (B, H, W), or `x` (B, S, C) and `mask`."""
    if hasattr(value, "_replace"):
        assert value.mask.any(), "the mask of padded pictures is lost before the transformer"
        return value._replace(x=value.x.masked_fill(value.mask[..., None], 1e4))
    if isinstance(value, Tensor):
        return value.masked_fill(resize_mask(mask, value)[:, None], 1e4)
    if len(value) == 2 and isinstance(value[1], Tensor) and value[1].dtype == torch.bool:
        return _spoilt(value[0], mask), value[1]
    return type(value)(_spoilt(one, mask) for one in value)


def native_operators_agree(model: Model) -> None:
    """With the native wheel and in plain torch."""
    for module in run_small(model):
        if ops.dispatch.wheel.cpu is None:
            raise SkipTest("detrcli-ops is not installed: there are no native operators to compare with")
        images, mask = pictures()
        waved(module)
        with torch.no_grad():
            with ops.use("native"):
                native = module(images, mask)
            with ops.use("reference"):
                plain = module(images, mask)
        assert torch.allclose(native.logits, plain.logits, atol=1e-3), "native operators change the classes"
        assert torch.allclose(native.boxes, plain.boxes, atol=1e-3), "native operators change the boxes"


def models_are_what_they_were(model: Model) -> None:
    """Tensors and answers as the package stores them: weights files must go on fitting, and a refactoring changes nothing."""
    before = stored(model)
    again = f"python -m detrcli.testing {model.family.name}"
    assert before, f"{model.name}: the package does not store it yet; write golden.json: {again}"
    assert before["keys"] == keys(model), (
        f"{model.name}: names or shapes of tensors changed, so older weights do not fit; if that is meant: {again}"
    )
    if "answers" in before:
        now = answers(model)
        assert not differs(now, before["answers"]), (
            f"{model.name} answers {now}, and answered {before['answers']}; if that is meant: {again}"
        )
