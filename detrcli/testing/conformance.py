"""The promises of a plugin, one function each. Declarations are checked for every variant, behaviour on the small ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detrcli import ops
from detrcli.boxes import cxcywh_to_xyxy
from detrcli.config import from_plain, to_plain
from detrcli.nn.backbone import resize_mask
from detrcli.plugins import Model, models
from detrcli.plugins.registry import fold
from detrcli.testing.golden import answers, keys, stored, waved
from detrcli.types import Output, Target
from detrcli.weights.fingerprint import differs
from detrcli.weights.keymap import apply, revert

Check = Callable[[Model], None]

SMALL = 5_000_000  # parameters up to which a model is run, not only declared
CLASSES = 3


def models_of(family: str) -> list[Model]:
    """The variants of an installed family."""
    return [m for m in models() if fold(m.family.name) == fold(family)]


def check_family(family: str) -> None:
    """Every check over every variant of a family."""
    found = models_of(family)
    assert found, f"no family {family!r} is installed; reinstall the package after adding its entry point"
    for model in found:
        for check in CHECKS:
            check(model)


def names_are_plain(model: Model) -> None:
    for name in (model.family.name, model.variant.name):
        assert re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", name), (
            f"{name!r}: use small letters, digits, - and _"
        )


def declaration_is_light(model: Model) -> None:
    """Listing the zoo must not load torch: plugin.py and config.py import it inside their builders."""
    module = model.found.entry_point.module
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'torchvision')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, (
        f"importing {module} loads torch or fails: import it inside the builders\n{run.stderr}"
    )


def numbers_have_sources(model: Model) -> None:
    published = model.variant.published
    assert published is None or published.source, (
        f"{model.name}: say where the published numbers stand (source=…)"
    )


def a_small_variant_exists(model: Model) -> None:
    sizes = {m.variant.name: m.variant.params for m in models_of(model.family.name)}
    assert any(size <= SMALL for size in sizes.values()), (
        f"{model.family.name}: add a variant below {SMALL} parameters, for tests"
    )


def parameters_are_counted(model: Model) -> None:
    with torch.device("meta"):
        module = model.build()
    counted = sum(p.numel() for p in module.parameters())
    assert counted == model.variant.params, (
        f"{model.name} has {counted:_} parameters, declared are {model.variant.params:_}"
    )


def parts_cover_the_model(model: Model) -> None:
    """Every parameter belongs to exactly one part, so that profiles and freezing need no code per paper."""
    with torch.device("meta"):
        module = model.build()
    prefixes = [p for paths in model.family.parts.values() for p in paths]
    for name, _ in module.named_parameters():
        owners = [p for p in prefixes if name == p or name.startswith(p + ".")]
        assert len(owners) == 1, (
            f"{model.name}: {name} is in {len(owners)} of parts={dict(model.family.parts)}"
        )


def recipes_name_parameters(model: Model) -> None:
    with torch.device("meta"):
        names = [name for name, _ in model.build().named_parameters()]
    for recipe in model.variant.recipes:
        for pattern in recipe.lr_factors:
            assert any(re.search(pattern, n) for n in names), (
                f"{model.name}: no parameter matches lr_factors {pattern!r}"
            )


def outputs_have_their_shapes(model: Model) -> None:
    for module in _small(model):
        images, mask = _batch()
        with torch.no_grad():
            output = module(images, mask)
        _check_output(output, len(images))
        for layer in output.aux:
            _check_output(layer, len(images))
            assert layer.boxes.shape == output.boxes.shape, (
                "auxiliary layers answer for the same queries as the last"
            )


def _check_output(output: Output, batch: int) -> None:
    queries = output.logits.shape[1]
    assert output.logits.shape[:2] == (batch, queries), (
        f"logits are {tuple(output.logits.shape)}, not (B, Q, K)"
    )
    assert output.logits.shape[2] in (CLASSES, CLASSES + 1), (
        "logits have one channel a class (and one for no object)"
    )
    assert output.boxes.shape == (batch, queries, 4), f"boxes are {tuple(output.boxes.shape)}, not (B, Q, 4)"
    assert torch.isfinite(output.logits).all(), "logits are finite"
    assert ((output.boxes >= 0) & (output.boxes <= 1)).all(), "boxes are cxcywh in [0, 1]"


def evaluation_is_deterministic(model: Model) -> None:
    for module in _small(model):
        images, mask = _batch()
        with torch.no_grad():
            first, second = module(images, mask), module(images, mask)
        assert torch.equal(first.logits, second.logits), "in eval mode the same pictures give the same answer"
        assert torch.equal(first.boxes, second.boxes), "in eval mode the same pictures give the same answer"


def pictures_do_not_see_each_other(model: Model) -> None:
    for module in _small(model):
        images, mask = _batch()
        with torch.no_grad():
            straight, swapped = module(images, mask), module(images.flip(0), mask.flip(0))
        assert torch.allclose(straight.logits, swapped.logits.flip(0), atol=1e-4), (
            "the order of a batch changes nothing"
        )
        assert torch.allclose(straight.boxes, swapped.boxes.flip(0), atol=1e-4), (
            "the order of a batch changes nothing"
        )


def no_mask_means_no_padding(model: Model) -> None:
    for module in _small(model):
        images, _ = _batch()
        with torch.no_grad():
            without = module(images)
            empty = module(images, torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool))
        assert torch.allclose(without.logits, empty.logits, atol=1e-5), (
            "model(images) is model(images, nothing padded)"
        )


def padding_is_never_read(model: Model) -> None:
    """Whatever stands in the padding of the maps or tokens, the transformer does not see it. Convolutions before that may."""
    family = model.family
    assert bool(family.masked_after) != bool(family.reads_padding), (
        f"{family.name}: say masked_after=MODULE, behind which padding is not read, or reads_padding=WHY it is"
    )
    for module in _small(model) if family.masked_after else ():
        images, mask = _batch()
        waved(module)
        with torch.no_grad():
            clean = module(images, mask)
            handle = module.get_submodule(family.masked_after).register_forward_hook(partial(_hook, mask))
            spoilt = module(images, mask)
            handle.remove()
        assert torch.allclose(clean.logits, spoilt.logits, atol=1e-4), (
            "what stands in the padding changes the classes"
        )
        assert torch.allclose(clean.boxes, spoilt.boxes, atol=1e-4), (
            "what stands in the padding changes the boxes"
        )


def _hook(mask: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return _spoilt(output, mask)


def _spoilt(value: Any, mask: Tensor) -> Any:
    """The same with 1e4 on all padding: maps (B, C, H, W), alone or beside their masks (B, H, W), or `x` (B, S, C) and `mask`."""
    if hasattr(value, "_replace"):
        return value._replace(x=value.x.masked_fill(value.mask[..., None], 1e4))
    if isinstance(value, Tensor):
        return value.masked_fill(resize_mask(mask, value)[:, None], 1e4)
    if len(value) == 2 and isinstance(value[1], Tensor) and value[1].dtype == torch.bool:
        return value[0].masked_fill(value[1][:, None], 1e4), value[1]
    return type(value)(_spoilt(one, mask) for one in value)


def native_operators_agree(model: Model) -> None:
    """With the native wheel and in plain torch; nothing to compare where it is not installed."""
    if ops.dispatch.wheel.cpu is None:
        return
    for module in _small(model):
        images, mask = _batch()
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


def the_page_names_every_variant(model: Model) -> None:
    """`detr zoo info FAMILY` shows the package's FAMILY.md."""
    assert model.page, f"the package of {model.family.name} has no {model.family.name}.md"
    assert f"`{model.name}`" in model.page or f"`{model.variant.name}`" in model.page, (
        f"{model.family.name}.md does not speak of {model.name}"
    )


def every_parameter_learns(model: Model) -> None:
    for module in _small(model):
        module.train()
        total = _loss(model, module, _targets())
        total.backward()  # type: ignore[no-untyped-call]
        idle = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (
            f"no gradient reaches {', '.join(idle[:5])}: distributed training would wait for them"
        )


def losses_stand_odd_targets(model: Model) -> None:
    """No objects in one picture, in none; more objects than queries."""
    for module in _small(model):
        module.train()
        one, none = _targets(), [_target(0), _target(0)]
        for targets in ([one[0], _target(0)], none, [_target(400), _target(1)]):
            total = _loss(model, module, targets)
            assert torch.isfinite(total), (
                f"the loss is not finite for {[len(t.labels) for t in targets]} objects"
            )


def detections_are_in_pixels(model: Model) -> None:
    for module in _small(model):
        images, mask = _batch()
        with torch.no_grad():
            output = module(images, mask)
        small = model.postprocess(output, torch.tensor([[100, 200], [100, 200]]))
        large = model.postprocess(output, torch.tensor([[200, 400], [200, 400]]))
        for a, b in zip(small, large, strict=True):
            assert (a.scores[:-1] >= a.scores[1:]).all(), "detections come best first"
            assert ((a.labels >= 0) & (a.labels < CLASSES)).all(), (
                "labels are contiguous, without the no-object channel"
            )
            assert torch.allclose(a.boxes * 2, b.boxes, atol=1e-3), (
                "boxes are xyxy in pixels of the sizes given"
            )


def perfect_answers_return_the_truth(model: Model) -> None:
    """Post-processing undoes what the transforms did: a perfect answer gives the objects back, in pixels."""
    for module in _small(model):
        images, mask = _batch()
        with torch.no_grad():
            output = module(images, mask)
        truth, (height, width) = _target(min(3, output.logits.shape[1])), (100, 200)
        logits, boxes = torch.full_like(output.logits, -20.0), output.boxes.clone()
        if output.logits.shape[2] > CLASSES:
            logits[..., -1] = 20.0
        for query, label in enumerate(truth.labels.tolist()):
            logits[:, query], logits[:, query, label] = -20.0, 20.0
            boxes[:, query] = truth.boxes[query]
        found = model.postprocess(
            replace(output, logits=logits, boxes=boxes),
            torch.tensor([[height, width]]).repeat(len(images), 1),
        )
        wanted = cxcywh_to_xyxy(truth.boxes) * torch.tensor([width, height, width, height])
        for one in found:
            for label, box in zip(truth.labels, wanted, strict=True):
                near = (one.boxes - box).abs().amax(1) < 1e-2
                assert (near & (one.labels == label)).any(), (
                    "a query that is sure of a class and box comes back with this label and box in pixels"
                )


def the_loss_falls(model: Model) -> None:
    """A few steps on two pictures: gradients point the right way."""
    for module in _small(model):
        module.train()
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        totals = []
        for _ in range(12):
            total = _loss(model, module, _targets())
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            totals.append(float(total.detach()))
        assert min(totals[-3:]) < 0.9 * totals[0], (
            f"12 steps on the same two pictures leave the loss at {totals[-1]:.3g}, from {totals[0]:.3g}"
        )


def declared_weights_can_be_read(model: Model) -> None:
    layouts = {"native", *model.family.key_maps}
    for weights in model.variant.weights:
        assert weights.layout in layouts, (
            f"{model.name}: {weights.repo} has layout {weights.layout!r}; key_maps knows {sorted(layouts)}"
        )


def configurations_travel(model: Model) -> None:
    """A weights file carries the configuration as JSON; it must come back as it was."""
    plain = json.loads(json.dumps(to_plain(model.config)))
    assert from_plain(type(model.config), plain) == model.config, (
        f"{type(model.config).__name__} does not survive JSON: use numbers, texts, tuples and dataclasses"
    )


def key_maps_run_both_ways(model: Model) -> None:
    with torch.device("meta"):
        state = model.build().state_dict()
    for layout, make in model.family.key_maps.items():
        there = revert(make(model.config), state)
        back = apply(make(model.config), there).tensors
        lost, new = state.keys() - back.keys(), back.keys() - state.keys()
        assert not lost, f"{model.name}: layout {layout!r} loses {sorted(lost)[:3]}"
        assert not new, f"{model.name}: layout {layout!r} invents {sorted(new)[:3]}"
        changed = [n for n in state if state[n].shape != back[n].shape]
        assert not changed, f"{model.name}: layout {layout!r} changes the shape of {changed[:3]}"


CHECKS: tuple[Check, ...] = (
    names_are_plain,
    declaration_is_light,
    numbers_have_sources,
    a_small_variant_exists,
    parameters_are_counted,
    parts_cover_the_model,
    recipes_name_parameters,
    outputs_have_their_shapes,
    evaluation_is_deterministic,
    pictures_do_not_see_each_other,
    no_mask_means_no_padding,
    padding_is_never_read,
    native_operators_agree,
    models_are_what_they_were,
    the_page_names_every_variant,
    every_parameter_learns,
    losses_stand_odd_targets,
    detections_are_in_pixels,
    perfect_answers_return_the_truth,
    the_loss_falls,
    declared_weights_can_be_read,
    configurations_travel,
    key_maps_run_both_ways,
)


def _small(model: Model) -> Iterator[nn.Module]:
    """The model with seeded weights, in eval mode; nothing when it is too large to run in a test."""
    if model.variant.params <= SMALL:
        torch.manual_seed(0)
        yield model.build(CLASSES).eval()


def _batch() -> tuple[Tensor, Tensor]:
    """Two pictures of different size, padded."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 96, 128, generator=generator)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = True, True
    images[mask[:, None].expand_as(images)] = 0
    return images, mask


def _target(count: int) -> Target:
    generator = torch.Generator().manual_seed(count)
    boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.3
    return Target(
        torch.arange(count) % CLASSES, boxes, {"masks": torch.ones(count, 96, 128, dtype=torch.uint8)}
    )


def _targets() -> list[Target]:
    return [_target(2), _target(3)]


def _loss(model: Model, module: nn.Module, targets: list[Target]) -> Tensor:
    images, mask = _batch()
    extra = (targets,) if model.family.takes_targets else ()
    criterion = model.family.build_criterion(model.config, CLASSES)
    return criterion(module(images, mask, *extra), targets).total
