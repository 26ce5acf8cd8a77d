"""Typed settings: what is set is checked, what is stored comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detrcli.config import assign, from_plain, parse_assignments, settings, to_plain
from detrcli.errors import UsageError
from detrcli.plugins import resolve


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str = "resnet50"
    levels: tuple[int, ...] = (3, 4)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float = 0.1
    count: int = 3
    flag: bool = False
    kind: Literal["step", "cosine"] = "step"
    maybe: str | None = "x"
    pair: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative")


outers = st.builds(
    Outer,
    inner=st.builds(Inner, name=st.text(), levels=st.lists(st.integers()).map(tuple)),
    rate=st.floats(allow_nan=False),
    count=st.integers(0),
    flag=st.booleans(),
    kind=st.sampled_from(["step", "cosine"]),
    maybe=st.none() | st.text().filter(lambda s: s != "none"),
)


@given(outers)
def test_plain_values_come_back(value):
    assert from_plain(Outer, to_plain(value)) == value


@given(outers)
def test_assigning_every_setting_changes_nothing(value):
    assert assign(value, settings(value)) == value


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("rate=1", "rate", 1.0),
        ("rate=1e-4", "rate", 1e-4),
        ("count=7", "count", 7),
        ("flag=true", "flag", True),
        ("kind=cosine", "kind", "cosine"),
        ("maybe=none", "maybe", None),
        ("maybe=some words", "maybe", "some words"),
        ("inner.levels=[5]", "inner.levels", (5,)),
        ("inner.name='swin tiny'", "inner.name", "swin tiny"),
        ("pair=[1, 2.5]", "pair", (1.0, 2.5)),
    ],
)
def test_texts_become_values_of_the_declared_type(text, path, value):
    assert settings(assign(Outer(), parse_assignments([text])))[path] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat=1", "unknown setting 'rat'"),
        ("inner.nam=x", "unknown setting 'inner.nam'"),
        ("rate=fast", "rate needs a number"),
        ("count=1.5", "count needs a whole number"),
        ("count=true", "count needs a whole number"),
        ("flag=1", "flag needs true or false"),
        ("kind=stp", "unknown value for kind"),
        ("rate.x=1", "has no parts"),
        ("count=-1", "count must not be negative"),
        ("pair=[1]", "pair needs"),
        ("inner.levels=['a']", r"inner.levels\[0\] needs a whole number"),
        ("count", "needs PATH=VALUE"),
        ("=3", "needs PATH=VALUE"),
    ],
)
def test_what_means_nothing_is_refused_by_name(text, message):
    with pytest.raises(UsageError, match=message):
        assign(Outer(), parse_assignments([text]))


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        ("detr", "dropout=1.5", "dropout must be at most 1"),
        ("deformable_detr", "dropout=nan", "dropout must be at least 0"),
        ("d2etr", "fuse_drop_path=-0.1", "fuse_drop_path must be at least 0"),
        ("d2etr", "iou_weight=-1", "iou_weight must be at least 0"),
        ("dino", "dropout=2", "dropout must be at most 1"),
        ("lite_dino", "host.dropout=2", r"host\.dropout must be at most 1"),
        ("dynamic_detr", "giou_weight=nan", "giou_weight must be at least 0"),
        ("detr", "no_object=-1", "no_object must be at least 0"),
        ("detr", "width=66 & heads=2", r"width \(66\) must be a multiple of 4"),
        ("detr", "backbone.drop_path=1.5", r"backbone\.drop_path must be at most 1"),
        ("detr", "backbone.levels=[]", r"backbone\.levels must be one or more that rise"),
        ("detr", "backbone.levels=[5, 3]", r"backbone\.levels must be one or more that rise"),
    ],
)
def test_settings_of_models_have_bounds_that_name_them(model, text, message):
    with pytest.raises(UsageError, match=message):
        assign(resolve(model).config, parse_assignments(text.split(" & ")))


def test_a_pattern_that_is_none_is_refused_by_name():
    recipe = resolve("detr").variant.recipes[0]
    with pytest.raises(UsageError, match=r"lr_factors: '\(' is no regular expression"):
        assign(recipe, parse_assignments(['lr_factors={"("=0.1}']))


def test_patterns_that_are_set_come_before_those_of_the_recipe():
    recipe = resolve("detr/r50").variant.recipes[0]
    factors = assign(recipe, parse_assignments(["lr_factors.backbone=0.5"])).lr_factors
    assert list(factors.items()) == [("backbone", 0.5), (r"^backbone\.", 0.1)]


def test_a_near_miss_is_pointed_out():
    with pytest.raises(UsageError) as caught:
        assign(Outer(), {"inner.nmae": "x"})
    assert "inner.name" in caught.value.hint


def test_unknown_keys_of_a_table_are_refused():
    with pytest.raises(UsageError, match=r"inner\.size"):
        from_plain(Outer, {"inner": {"size": 3}})
