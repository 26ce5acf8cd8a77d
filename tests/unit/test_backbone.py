"""timm networks of every make give maps of one form, or an error that says what they have."""

from __future__ import annotations

import pytest
import torch

from detrcli.errors import UsageError
from detrcli.nn.backbone import Backbone
from detrcli.plugins.backbones import BackboneConfig


def config(name: str, *levels: int, drop_path: float = 0.0) -> BackboneConfig:
    return BackboneConfig(
        name=name, levels=levels, norm="default", frozen=(), pretrained=None, drop_path=drop_path
    )


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "swin_s3_tiny_224"])
def test_maps_are_channels_first_at_any_picture_size(name: str) -> None:
    backbone = Backbone(config(name, 3, 4)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 65, 103), torch.zeros(1, 65, 103, dtype=torch.bool))
    for (features, mask), channels, stride in zip(maps, backbone.channels, (8, 16), strict=True):
        assert features.shape[1] == channels
        assert features.shape[2] in (65 // stride, -(-65 // stride))
        assert mask.shape[1:] == features.shape[2:]


def test_drop_path_grows_with_depth() -> None:
    rates = [
        m.drop_prob
        for m in Backbone(config("test_convnext", 5, drop_path=0.2)).modules()
        if hasattr(m, "drop_prob")
    ]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)


def test_a_level_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"\[4, 4, 4\], not at \[3\]") as caught:
        Backbone(config("test_vit", 3))
    assert "model.backbone.levels" in str(caught.value.hint)


def test_an_unknown_network_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown timm backbone 'resnet5'") as caught:
        Backbone(config("resnet5", 5))
    assert "resnet50" in str(caught.value.hint)
