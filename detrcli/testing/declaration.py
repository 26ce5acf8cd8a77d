"""What a package says of itself, checked for every variant; nothing is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from detrcli.config import from_plain, to_plain
from detrcli.plugins import Model, models
from detrcli.plugins.registry import fold
from detrcli.testing.samples import SMALL, skeleton
from detrcli.weights.keymap import apply, revert


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
    sizes = {
        m.variant.name: m.variant.params for m in models() if fold(m.family.name) == fold(model.family.name)
    }
    assert any(size <= SMALL for size in sizes.values()), (
        f"{model.family.name}: add a variant below {SMALL} parameters, for tests"
    )


def parameters_are_counted(model: Model) -> None:
    module = skeleton(model)
    counted = sum(p.numel() for p in module.parameters())
    assert counted == model.variant.params, (
        f"{model.name} has {counted:_} parameters, declared are {model.variant.params:_}"
    )


def parts_cover_the_model(model: Model) -> None:
    """Every parameter belongs to exactly one part, so that profiles and freezing need no code per paper."""
    module = skeleton(model)
    prefixes = [p for paths in model.family.parts.values() for p in paths]
    for name, _ in module.named_parameters():
        owners = [p for p in prefixes if name == p or name.startswith(p + ".")]
        assert len(owners) == 1, (
            f"{model.name}: {name} is in {len(owners)} of parts={dict(model.family.parts)}"
        )


def recipes_name_parameters(model: Model) -> None:
    names = [name for name, _ in skeleton(model).named_parameters()]
    for recipe in model.variant.recipes:
        for pattern in recipe.lr_factors:
            assert any(re.search(pattern, n) for n in names), (
                f"{model.name}: no parameter matches lr_factors {pattern!r}"
            )


def the_page_names_every_variant(model: Model) -> None:
    """`detr zoo info FAMILY` shows the package's FAMILY.md."""
    assert model.page, f"the package of {model.family.name} has no {model.family.name}.md"
    assert f"`{model.name}`" in model.page or f"`{model.variant.name}`" in model.page, (
        f"{model.family.name}.md does not speak of {model.name}"
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
    state = skeleton(model).state_dict()
    for layout, make in model.family.key_maps.items():
        there = revert(make(model.config), state)
        back = apply(make(model.config), there).tensors
        lost, new = state.keys() - back.keys(), back.keys() - state.keys()
        assert not lost, f"{model.name}: layout {layout!r} loses {sorted(lost)[:3]}"
        assert not new, f"{model.name}: layout {layout!r} invents {sorted(new)[:3]}"
        changed = [n for n in state if state[n].shape != back[n].shape]
        assert not changed, f"{model.name}: layout {layout!r} changes the shape of {changed[:3]}"
