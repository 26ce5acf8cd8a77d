"""Laws of the Lite DETR families: padding, configurations that are refused, where weights may come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detrcli
from detrcli.config import assign, from_plain, to_plain
from detrcli.errors import CheckpointError, UsageError
from detrcli.plugins.registry import Model, resolve
from detrcli.types import Categories, Output
from detrcli.weights import file
from detrcli.weights.keymap import revert
from detrcli.weights.metadata import Metadata
from detrcli.weights.opened import open_weights
from detrcli.weights.resolve import choose
from detrcli.weights.warm import starting_from, told, warm_start
from detrcli_lite_detr.config import LiteDeformableConfig

FAMILIES = ("lite_deformable", "lite_dino", "dino")
each_family = pytest.mark.parametrize("family", FAMILIES)
CLASSES = Categories((1, 2, 3), ("circle", "square", "triangle"))


def tiny(family: str) -> Model:
    return resolve(f"{family}/tiny")


def model(family: str) -> nn.Module:
    """A model whose answers differ: fresh heads and offsets are constant."""
    torch.manual_seed(0)
    module = tiny(family).build(3).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("backbone"):
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return module


def pictures() -> tuple[Tensor, Tensor]:
    """Three pictures of different sizes, padded to one."""
    generator = torch.Generator().manual_seed(0)
    images, mask = torch.zeros(3, 3, 64, 96), torch.ones(3, 64, 96, dtype=torch.bool)
    for i, (h, w) in enumerate(((64, 96), (48, 61), (64, 33))):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return images, mask


def close(a: Output, b: Output, atol: float) -> None:
    torch.testing.assert_close(a.logits, b.logits, atol=atol, rtol=0)
    torch.testing.assert_close(a.boxes, b.boxes, atol=atol, rtol=0)


@each_family
@torch.no_grad()
def test_what_stands_in_the_padding_of_the_tokens_is_never_read(family: str) -> None:
    module: Any = model(family)
    images, mask = pictures()
    tokens = module.levels(module.backbone(images, mask))
    noise = torch.where(tokens.mask[..., None], torch.randn_like(tokens.x) * 100, tokens.x)
    close(module.answer(tokens), module.answer(tokens._replace(x=noise)), atol=1e-4)


@each_family
@torch.no_grad()
def test_a_picture_is_answered_alike_alone_and_in_a_batch(family: str) -> None:
    module, (images, mask) = model(family), pictures()
    together = module(images, mask)
    for i in range(3):
        alone = module(images[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together.boxes[i], alone.boxes[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["lite_deformable", "lite_dino"])
def test_the_whole_forward_compiles_without_a_graph_break(family: str) -> None:
    module, (images, mask) = model(family), pictures()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(module(images, mask), compiled(images, mask), atol=1e-4)


# --- configurations


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder.high_levels": 0}, r"encoder\.high_levels \(0\) must be between 1 and 3"),
        ({"encoder.high_levels": 4}, r"encoder\.high_levels \(4\) must be between 1 and 3"),
        ({"encoder.blocks": 4}, r"encoder\.blocks \(4\) must divide host\.encoder_layers \(6\)"),
        ({"encoder.blocks": 0}, r"encoder\.blocks must be at least 1 \(value given: 0\)"),
        ({"encoder.low_ffn": 0}, r"encoder\.low_ffn must be at least 1 \(value given: 0\)"),
        ({"host.encoder_layers": 0}, r"host\.encoder_layers must be at least 1 \(value given: 0\)"),
        ({"encoder.key_aware": False, "encoder.own_keys": True}, "own_keys"),
        ({"host.levels": 1, "host.backbone.levels": [5]}, r"host\.levels \(1\) must be at least 2"),
    ],
)
@pytest.mark.parametrize("family", ["lite_deformable", "lite_dino"])
def test_what_cannot_be_interleaved_is_refused_with_the_field_named(
    family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        assign(resolve(family).config, changes)


@pytest.mark.parametrize("changes", [{"denoising": -1}, {"label_noise": 3.0}, {"box_noise": -0.1}])
def test_noise_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        assign(resolve("dino").config, changes)


@pytest.mark.parametrize(("levels", "layers", "blocks"), [(2, 2, 1), (3, 4, 2), (5, 3, 3)])
@pytest.mark.parametrize("reading", ["released", "paper"])
@torch.no_grad()
def test_any_number_of_levels_and_blocks_runs(levels: int, layers: int, blocks: int, reading: Any) -> None:
    declared = tiny("lite_deformable")
    host = replace(declared.config.host, levels=levels, encoder_layers=layers)
    choice = replace(declared.config.encoder, high_levels=1, blocks=blocks, reading=reading)
    module = declared.configured(LiteDeformableConfig(host=host, encoder=choice)).build(3).eval()
    assert torch.isfinite(module(*pictures()).boxes).all()


# --- weights


def saved(path: Path, name: str, config: Any, state: dict[str, Tensor]) -> Path:
    file.save(path, state, Metadata(model=name, num_classes=3, config=to_plain(config), categories=CLASSES))
    return path


def test_a_file_without_its_level_split_is_refused_with_the_question(tmp_path: Path) -> None:
    declared = tiny("lite_deformable")
    plain = to_plain(declared.config)
    del plain["encoder"]["high_levels"]
    path = saved(tmp_path / "x.safetensors", declared.name, plain, model("lite_deformable").state_dict())
    with pytest.raises(CheckpointError, match=r"encoder\.high_levels is missing") as caught:
        open_weights(choose(None, str(path)))
    assert "which row of the table is it?" in str(caught.value.hint)


def test_a_file_whose_blocks_contradict_its_tensors_is_refused(tmp_path: Path) -> None:
    declared = tiny("lite_deformable")
    other = assign(declared.config, {"encoder.blocks": 2})
    path = saved(tmp_path / "x.safetensors", declared.name, other, model("lite_deformable").state_dict())
    with pytest.raises(CheckpointError, match=r"missing: encoder\.layers\.0\.low"):
        open_weights(choose(None, str(path)))


def test_the_level_split_of_an_official_file_is_asked_for(tmp_path: Path) -> None:
    declared = tiny("lite_dino")
    official = declared.family.key_maps["official"](declared.config)
    path = tmp_path / "r50_s3ex1.pth"
    torch.save({"model": revert(official, model("lite_dino").state_dict())}, path)
    with pytest.raises(CheckpointError, match="which row of the table") as caught:
        choose("lite_dino", str(path))
    assert "lite_dino/h2l2-2x3" in str(caught.value.hint)
    opened = open_weights(choose("lite_dino/tiny", str(path)))
    close(opened.module(*pictures()), model("lite_dino")(*pictures()), atol=0)


@pytest.mark.parametrize("family", ["lite_deformable", "lite_dino"])
def test_another_level_split_than_the_files_is_refused(tmp_path: Path, family: str) -> None:
    declared, split = tiny(family), {"encoder.high_levels": 1}
    config = assign(declared.config, split)
    path = saved(tmp_path / "x.safetensors", declared.name, config, model(family).state_dict())
    other = detrcli.create_model(declared.name, num_classes=3)
    before = {name: x.clone() for name, x in other.state_dict().items()}
    for load in (
        lambda: detrcli.load_weights(other, path),
        lambda: warm_start(other, path, declared, classes=CLASSES),
    ):
        with pytest.raises(
            CheckpointError, match=r"encoder\.high_levels=1, .* encoder\.high_levels=2"
        ) as caught:
            load()
        assert "--set model.encoder.high_levels=1" in str(caught.value.hint)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    same = detrcli.create_model(declared.name, num_classes=3, **split)
    assert not detrcli.load_weights(same, path).problems
    assert not warm_start(same, path, declared.configured(config)).problems


def donor(family: str) -> tuple[Model, nn.Module]:
    """The plain model of the same size."""
    lite = tiny({"deformable_detr": "lite_deformable", "dino": "lite_dino"}[family])
    declared = resolve(f"{family}/tiny").configured(lite.config.host)
    torch.manual_seed(1)
    return declared, declared.build(3)


@pytest.mark.parametrize(("lite", "plain"), [("lite_deformable", "deformable_detr"), ("lite_dino", "dino")])
@pytest.mark.parametrize("layout", ["native", "official"])
def test_a_training_starts_from_the_hosts_weights(tmp_path: Path, lite: str, plain: str, layout: str) -> None:
    declared, given = donor(plain)
    path = tmp_path / "host.safetensors"
    saved(path, declared.name, declared.config, given.state_dict())
    if layout == "official":
        official = declared.family.key_maps["official"](declared.config)
        path = tmp_path / "host.pth"
        torch.save({"model": revert(official, given.state_dict())}, path)
    module = tiny(lite).build(3)
    fresh = {name: x.clone() for name, x in module.state_dict().items()}
    report = warm_start(module, path, tiny(lite), classes=CLASSES if layout == "native" else None)
    assert report.layout == layout
    own, theirs = module.state_dict(), given.state_dict()
    assert all(torch.equal(own[n], theirs[n]) for n in report.kept)
    assert all(torch.equal(own[n], fresh[n]) for n in report.missing)
    assert set(report.kept) | set(report.missing) == set(own)
    lines = told(report)
    assert any(
        "new: " in line and "encoder.layers.*.self_attn.query_proj.weight (2)" in line for line in lines
    )
    assert any("left out: " in line and "attention_weights.weight" in line for line in lines)


def test_a_bare_family_that_starts_from_its_hosts_file_is_its_default(tmp_path: Path) -> None:
    """The host's tensors tell nothing of the row; a file of the family itself is of one, and must say of which."""
    path = tmp_path / "silent.pth"

    def chosen(name: str) -> str:
        declared = tiny(name)
        official = declared.family.key_maps["official"](declared.config)
        torch.save({"model": revert(official, declared.build().state_dict())}, path)
        return starting_from("lite_deformable", str(path)).name

    assert chosen("deformable_detr") == resolve("lite_deformable").name
    with pytest.raises(CheckpointError, match="does not say which row"):
        chosen("lite_deformable")


def test_a_donor_that_differs_elsewhere_is_refused(tmp_path: Path) -> None:
    declared, given = donor("deformable_detr")
    state = given.state_dict()
    del state["queries.enc_output.weight"]
    path = saved(tmp_path / "host.safetensors", declared.name, declared.config, state)
    with pytest.raises(CheckpointError, match="does not fit"):
        warm_start(tiny("lite_deformable").build(3), path, tiny("lite_deformable"))


def test_a_file_of_another_row_is_no_donor(tmp_path: Path) -> None:
    """Its missing feed-forwards must not pass as new ones."""
    declared = tiny("lite_dino")
    state = {n: x for n, x in model("lite_dino").state_dict().items() if ".low." not in n}
    official = revert(declared.family.key_maps["official"](declared.config), state)
    path = tmp_path / "other.pth"
    torch.save({"model": official}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        warm_start(declared.build(3), path, declared)


def test_configurations_survive_the_way_through_plain_values() -> None:
    for family in FAMILIES:
        config = resolve(family).config
        assert from_plain(type(config), to_plain(config)) == config
