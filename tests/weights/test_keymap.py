from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detrcli.errors import CheckpointError
from detrcli.weights.keymap import Alias, Drop, Fill, Fuse, KeyMap, Rename, apply, revert
from detrcli.weights.layouts import COUNTERS, HUB_SPELLINGS

MAP = KeyMap(
    (
        *COUNTERS,
        Alias("class_embed.*.**", ("decoder.class_embed.*.**",)),
        Fuse(("**.q_proj.*", "**.k_proj.*", "**.v_proj.*"), "**.in_proj_*"),
        Rename("transformer.encoder.**", "encoder.**"),
        Rename("**.fc1.*", "**.linear1.*"),
    )
)


def numbered(names: list[str], rows: int = 2) -> dict[str, torch.Tensor]:
    return {name: torch.arange(rows * 3.0).reshape(rows, 3) + 10 * i for i, name in enumerate(names)}


def test_rules_apply_in_order_and_report_what_they_left_out():
    names = ["transformer.encoder.0.fc1.weight", "bn.num_batches_tracked", "x.total_ops"]
    mapped = apply(MAP, numbered(names))
    assert list(mapped.tensors) == ["encoder.0.linear1.weight"]
    assert mapped.origin["encoder.0.linear1.weight"] == ("transformer.encoder.0.fc1.weight",)
    assert mapped.dropped == ("bn.num_batches_tracked", "x.total_ops")


def test_query_key_and_value_are_joined_in_this_order_whatever_the_order_in_the_file():
    file = numbered(["a.v_proj.weight", "a.k_proj.weight", "a.q_proj.weight"])
    joined = apply(MAP, file).tensors["a.in_proj_weight"]
    assert torch.equal(joined, torch.cat([file[f"a.{x}_proj.weight"] for x in "qkv"]))


def test_an_incomplete_fuse_leaves_its_parts_to_be_reported():
    assert set(apply(MAP, numbered(["a.q_proj.weight", "a.k_proj.weight"])).tensors) == {
        "a.q_proj.weight",
        "a.k_proj.weight",
    }


@pytest.mark.parametrize(
    "held",
    [
        ["class_embed.0.bias"],
        ["decoder.class_embed.0.bias"],
        ["class_embed.0.bias", "decoder.class_embed.0.bias"],
    ],
)
def test_a_shared_head_may_be_stored_under_either_name_or_both(held: list[str]):
    value = torch.randn(4)
    mapped = apply(MAP, {name: value.clone() for name in held})
    assert list(mapped.tensors) == ["class_embed.0.bias"]
    assert torch.equal(mapped.tensors["class_embed.0.bias"], value)
    assert sorted(mapped.origin["class_embed.0.bias"]) == sorted(held)


def test_two_names_of_one_tensor_with_two_values_are_an_error_that_names_both():
    with pytest.raises(CheckpointError, match=r"class_embed\.0\.bias and decoder\.class_embed\.0\.bias"):
        apply(MAP, {"class_embed.0.bias": torch.zeros(2), "decoder.class_embed.0.bias": torch.ones(2)})


def test_two_tensors_for_one_name_are_an_error_that_names_both():
    with pytest.raises(CheckpointError, match=r"encoder\.x and transformer\.encoder\.x"):
        apply(MAP, numbered(["encoder.x", "transformer.encoder.x"]))


def test_copies_are_filled_only_when_all_are_absent():
    fill = KeyMap((Fill("head.0.*", ("head.1.*", "head.2.*")),))
    mapped = apply(fill, {"head.0.bias": torch.ones(2)})
    assert mapped.filled == ("head.1.bias", "head.2.bias")
    assert torch.equal(mapped.tensors["head.2.bias"], torch.ones(2))
    partial = apply(fill, {"head.0.bias": torch.ones(2), "head.1.bias": torch.zeros(2)})
    assert "head.2.bias" not in partial.tensors


def test_a_rule_sees_what_the_rules_before_it_left():
    swap = KeyMap((Rename("a.*.x", "a.*.y"), Rename("a.*.y", "a.*.z")))
    assert set(apply(swap, numbered(["a.1.x", "b"])).tensors) == {"a.1.z", "b"}


def test_patterns_need_the_same_wildcards():
    with pytest.raises(ValueError, match="same wildcards"):
        Rename("a.*", "b.**")
    with pytest.raises(ValueError, match="same wildcards"):
        Fuse(("a.*", "b"), "c.*")


def test_a_star_stops_at_a_dot():
    assert list(apply(KeyMap((Drop("a.*.b"),)), numbered(["a.1.b", "a.1.2.b"])).tensors) == ["a.1.2.b"]


names = st.lists(
    st.sampled_from(
        [f"transformer.encoder.{i}.{leaf}" for i in range(3) for leaf in ("fc1.weight", "norm.bias")]
        + [f"transformer.encoder.{i}.{p}_proj.weight" for i in range(2) for p in "qkv"]
        + ["other.weight", "class_embed.0.bias"]
    ),
    unique=True,
)


@given(names)
def test_a_map_runs_back_to_the_same_names_and_values(present: list[str]):
    file = numbered(present)
    back = revert(MAP, apply(MAP, file).tensors)
    assert {n: t for n, t in back.items() if not n.startswith("decoder.")}.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("model.backbone.model.conv1.weight", "conv1.weight"),
        ("model.backbone.conv_encoder.model.embedder.embedder.convolution.weight", "conv1.weight"),
        (
            "model.backbone.model.encoder.stages.0.layers.0.shortcut.convolution.weight",
            "layer1.0.downsample.0.weight",
        ),
        (
            "detr.model.backbone.conv_encoder.model.encoder.stages.2.layers.5.layer.1.normalization.running_var",
            "layer3.5.bn2.running_var",
        ),
    ],
)
def test_every_spelling_of_a_backbone_on_the_hub_is_read_and_one_is_written(spelling: str, name: str):
    classic = f"model.backbone.conv_encoder.model.{name}"
    assert list(apply(HUB_SPELLINGS, numbered([spelling])).tensors) == [classic]
    assert list(revert(HUB_SPELLINGS, numbered([classic]))) == [classic]


def test_new_names_of_layers_on_the_hub_are_read():
    new = ["model.encoder.layers.0.mlp.fc1.weight", "model.encoder.layers.0.self_attn.o_proj.bias"]
    classic = ["model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.self_attn.out_proj.bias"]
    assert list(apply(HUB_SPELLINGS, numbered(new)).tensors) == classic
