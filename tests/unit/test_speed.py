"""The levers of inference change the time, never the answer, and never the model they are given."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn

from detrcli.errors import UsageError
from detrcli.nn.backbone import Backbone
from detrcli.nn.layers import FrozenBatchNorm2d
from detrcli.nn.speed import LEVERS, PixelConv2d, describe, fastest, keep_memory, levers
from detrcli.plugins.backbones import BackboneConfig


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    module = Backbone(BackboneConfig(name="resnet18", levels=(3, 4, 5), pretrained=None)).eval()
    for name, buffer in module.named_buffers():
        spread = torch.rand_like(buffer)
        buffer.copy_(spread + 0.5 if name.endswith(("weight", "running_var")) else spread - 0.5)
    return module


@torch.no_grad()
@pytest.mark.parametrize("asked", ["fold", "layout", "onednn", "fold,layout", "on", "off"])
def test_answers_stay_the_same(backbone: Backbone, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_FAST", asked)
    fast = fastest(backbone)
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    for (a, _), (b, _) in zip(backbone(images, mask), fast(images, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    norms = [m for m in fast.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert bool(norms) == (asked not in ("fold", "fold,layout", "on"))
    ordered = fast.body.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert ordered == (asked not in ("fold", "onednn", "off"))


def test_the_model_given_stays_as_it_is_and_shares_what_it_can(backbone: Backbone) -> None:
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(3, 3)}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = fastest(model)
    assert not fast.training
    assert model.training
    assert fast["head"].weight is model["head"].weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in backbone.body.layer2.parameters())


def test_a_group_norm_is_left_alone() -> None:
    module = Backbone(
        BackboneConfig(name="test_resnet", levels=(3,), norm="group", frozen=(), pretrained=None)
    )
    kinds = [type(m) for m in module.modules() if not isinstance(m, nn.Conv2d)]
    assert [type(m) for m in fastest(module).modules() if not isinstance(m, nn.Conv2d)] == kinds


@torch.no_grad()
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
def test_convolutions_of_one_pixel_are_the_same_in_onednn() -> None:
    model = nn.Sequential(nn.Conv2d(5, 7, 1), nn.Conv2d(7, 6, 1, bias=False), nn.Conv2d(6, 4, 1, stride=2))
    fast, images = fastest(model), torch.randn(2, 5, 9, 8)
    assert [type(m) for m in fast] == [PixelConv2d, PixelConv2d, nn.Conv2d]
    torch.testing.assert_close(fast(images), model(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [("", set(LEVERS)), ("OFF", set()), ("fold, allocator", {"fold", "allocator"})],
)
def test_the_environment_chooses(asked: str, chosen: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_FAST", asked)
    assert levers() == chosen
    assert {name for name, state in describe().items() if state == "on"} <= chosen


def test_an_unknown_lever_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_FAST", "layuot")
    with pytest.raises(UsageError, match="layuot") as caught:
        levers()
    assert "layout" in (caught.value.hint or "")


def test_memory_is_kept_where_the_library_is_glibc() -> None:
    assert keep_memory() == (platform.libc_ver()[0] == "glibc")
