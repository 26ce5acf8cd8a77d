"""The levers of inference change the time, never the answer, and never the model they are given."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from detrcli import processors
from detrcli.errors import UsageError
from detrcli.nn import speed
from detrcli.nn.backbone import Backbone
from detrcli.nn.layers import MLP, FrozenBatchNorm2d, LinearReLU
from detrcli.nn.onednn import Conv2d, Linear, RectifiedLinear, Residual
from detrcli.nn.speed import LEVERS, describe, fastest, has_onednn, keep_memory, levers
from detrcli.plugins.backbones import BackboneConfig


@pytest.fixture(params=["resnet18", "resnet50"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    module = Backbone(BackboneConfig(name=request.param, levels=(2, 3, 4, 5), pretrained=None)).eval()
    for name, buffer in module.named_buffers():
        spread = torch.rand_like(buffer)
        buffer.copy_(spread + 0.5 if name.endswith(("weight", "running_var")) else spread - 0.5)
    return module


@torch.no_grad()
@pytest.mark.parametrize("asked", ["fold", "layout", "onednn", "fold,layout", "fold,onednn", "on", "off"])
def test_answers_stay_the_same(backbone: Backbone, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_FAST", asked)
    fast = fastest(backbone)
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    before = images.clone()
    for (a, _), (b, _) in zip(backbone(images, mask), fast(images, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    assert torch.equal(images, before)
    norms = [m for m in fast.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert bool(norms) == ("fold" not in asked and asked != "on")
    ordered = fast.body.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert ordered == ("layout" in asked or asked == "on")


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


onednn = pytest.mark.skipif(not has_onednn(), reason="no oneDNN in this torch, or another processor")


@onednn
@torch.no_grad()
@pytest.mark.parametrize("amp", [False, True])
def test_onednn_takes_relus_and_sums_with_it(backbone: Backbone, amp: bool) -> None:
    fast = fastest(backbone)
    blocks = [block for stage in "1234" for block in fast.body[f"layer{stage}"]]
    wide = type(backbone.body.layer1[0]).__name__ == "Bottleneck"
    # the first block of a ResNet-18 adds the map before it as it is, which is not its own to write to
    assert [type(block) is Residual for block in blocks] == [wide, *[True] * (len(blocks) - 1)]
    assert all(type(m) is Conv2d for m in fast.modules() if isinstance(m, nn.Conv2d))
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        answers = [maps for maps, _ in fast(images, mask)]
        again = [maps for maps, _ in fast(images, mask)]
    for found, same, (wanted, _) in zip(answers, again, backbone(images, mask), strict=True):
        assert found.dtype == (torch.bfloat16 if amp else torch.float32)
        assert torch.equal(found, same)
        near = 0.05 if amp else 1e-5
        torch.testing.assert_close(found.float(), wanted, rtol=near, atol=near * wanted.abs().max().item())


@onednn
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_layers_are_the_same_in_onednn_in_any_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(5, 7, 1), nn.ReLU(), nn.Conv2d(7, 6, 3, 2, "valid"), nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False),
        nn.Flatten(2), nn.Linear(12, 4), nn.ReLU(), MLP(4, 9, 3, 2),
    ).to(dtype)  # fmt: skip
    fast, images = fastest(model), torch.randn(2, 5, 9, 8).to(dtype)
    kinds = [Conv2d, nn.Identity, nn.Conv2d, Conv2d, nn.Flatten, Linear, nn.Identity, MLP]
    assert [type(m) for m in fast] == kinds
    assert [type(m) for m in fast[-1].layers] == [RectifiedLinear, Linear]
    near = {} if dtype in (torch.float32, torch.float64) else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(fast(images), model(images), **near)
    assert fast(images[:0]).shape == (0, 8, 3)
    one, row = images[0], images.flatten()[:12]  # without a batch
    torch.testing.assert_close(fast[:4](one), model[:4](one), **near)
    torch.testing.assert_close(fast[5:7](row), model[5:7](row), **near)
    if dtype != torch.float64:  # which no autocast lowers
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(images).dtype == torch.bfloat16


@onednn
@torch.no_grad()
@pytest.mark.parametrize("amp", [False, True])
def test_nan_goes_through_every_layer(backbone: Backbone, amp: bool) -> None:
    """Of a diverged network nobody must believe that it sees nothing."""
    images, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]
    for name in [*layers[:4], layers[-1]]:
        fast = fastest(backbone)
        broken = fast.get_submodule(name)
        weight = broken.weight.clone()
        weight[0] = -torch.tensor(float("nan"))
        broken.weight = nn.Parameter(weight, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            assert fast(images, mask)[-1][0].isnan().any(), name
    linear = fastest(nn.Sequential(LinearReLU(4, 3), LinearReLU(3, 2)))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert linear(torch.tensor([[float("nan")] * 4, [1.0] * 4])).isnan().any(1).tolist() == [True, False]


@onednn
def test_a_fast_layer_still_has_gradients_where_they_are_asked_for() -> None:
    model = nn.Sequential(LinearReLU(4, 3), nn.Linear(3, 2))
    x = torch.randn(5, 4, requires_grad=True)
    wanted = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    fast = fastest(model)
    for got, want in zip(torch.autograd.grad(fast(x).sum(), [x, *fast.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got, want)


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


@pytest.mark.parametrize(
    ("files", "allowed", "wanted"),
    [
        ({}, 6, 6),
        ({"cpu.max": "max 100000"}, 6, 6),
        ({"cpu.max": "250000 100000"}, 6, 2),
        ({"cpu.max": "20000 100000"}, 6, 1),
        ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 6, 3),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 6, 6),
    ],
)
def test_processors_are_those_that_the_container_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], allowed: int, wanted: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(processors, "_QUOTAS", (tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"))
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda process: set(range(allowed)))
    assert processors.processors() == wanted


def test_threads_are_shared_with_ranks_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(speed, "processors", lambda: 8)
    monkeypatch.setattr(speed.torch, "get_num_threads", lambda: 64)
    chosen: list[int] = []
    monkeypatch.setattr(speed.torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    speed.choose_threads(workers=1)
    assert chosen == [3]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    speed.choose_threads(workers=1)
    assert chosen == [3]


@pytest.mark.parametrize(("asked", "wanted"), [("on", 1), ("off", 2), ("fold", 2)])
def test_inference_takes_no_more_threads_than_there_are_processors(
    backbone: Backbone, asked: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("DETR_FAST", asked)
    monkeypatch.setattr(speed, "processors", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fastest(backbone)
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)
