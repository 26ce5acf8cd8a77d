"""timm backbones as detectors use them: a few feature maps, each with its padding mask. Nothing is downloaded when one is built."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from detrcli.errors import HubError, UsageError, unknown
from detrcli.nn.layers import FrozenBatchNorm2d
from detrcli.nn.swin import SwinBody
from detrcli.plugins.backbones import BackboneConfig


class Backbone(nn.Module):
    """images (B, 3, H, W) and mask (B, H, W) -> one (features, mask) a level, finest first."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _create(config, config.name, pretrained=False)
        maps = self.body.feature_info.get_dicts(keys=["num_chs", "reduction"])
        self.channels = tuple(m["num_chs"] for m in maps)
        self.strides = tuple(m["reduction"] for m in maps)
        _check_frozen(config, self.body)
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(not name.startswith(config.frozen))

    def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        maps = self.body(images)
        if self.body.output_fmt == "NHWC":  # Swin and kin
            maps = [features.permute(0, 3, 1, 2) for features in maps]
        return [(features, resize_mask(mask, features)) for features in maps]

    def load_pretrained(self) -> None:
        """Take the ImageNet weights the configuration names; for training from scratch only."""
        source = self.config.starts_from
        if source is None:
            return
        try:
            donor = _create(self.config, source, pretrained=True)
        except Exception as error:  # timm, the Hub and the network each have their own kinds
            raise HubError(
                f"the ImageNet weights {source} could not be fetched: {error}",
                hint="go online once, start from a checkpoint with --weights, or start from nothing with "
                "--set model.backbone.pretrained=none",
            ) from error
        self.body.load_state_dict(donor.state_dict(), strict=False)


def _check_frozen(config: BackboneConfig, body: nn.Module) -> None:
    """Refuse a prefix that freezes nothing; but the default ones, which are of ResNets, may stay where only the name was changed."""
    if config.frozen == BackboneConfig().frozen:
        return
    names = [name for name, _ in (*body.named_modules(), *body.named_parameters())]
    for prefix in config.frozen:
        if not any(name.startswith(prefix) for name in names):
            raise UsageError(
                f"model.backbone.frozen: {config.name} has no {prefix!r}",
                hint=f"choose among {', '.join(name for name, _ in body.named_children())} and their parts",
            )


def resize_mask(mask: Tensor, features: Tensor) -> Tensor:
    """The padding mask at the size of a feature map: nearest neighbour, index floor(i * in / out).

    In whole numbers: runtimes of exported files round scales in their own way, and would read a row too early.
    """
    rows, columns = (
        torch.arange(wanted, device=mask.device) * have // wanted
        for wanted, have in zip(features.shape[-2:], mask.shape[-2:], strict=True)
    )
    return mask.index_select(1, rows).index_select(2, columns)


def _create(config: BackboneConfig, name: str, *, pretrained: bool) -> Any:
    """The timm network with the wanted maps; built once on the meta device to learn which maps there are."""
    options: dict[str, Any] = {"features_only": True}
    if config.norm != "default":
        options["norm_layer"] = FrozenBatchNorm2d if config.norm == "frozen" else _group_norm
        options["zero_init_last"] = False  # a frozen norm cannot grow out of zero
    if config.dilated:
        options["output_stride"] = 16
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if _architecture(name).startswith("swin"):
        options["strict_img_size"] = False
    if name.startswith("swin_"):
        options["always_partition"] = True  # else a map of one window at 224 pixels is never shifted
    levels = _levels(_skeleton(config, name, options), config.dilated)
    missing = [level for level in config.levels if level not in levels]
    if missing:
        raise UsageError(
            f"backbone {name} has maps at levels {levels}, not at {missing} (level l has stride 2**l)",
            hint=f"choose among them: --set model.backbone.levels={levels}",
        )
    body = timm.create_model(
        name, pretrained=pretrained, out_indices=[levels.index(i) for i in config.levels], **options
    )
    for module in body.modules():
        if hasattr(module, "dynamic_img_pad"):
            # pictures need not be a multiple of the patch
            module.dynamic_img_pad = True  # type: ignore[assignment]
    return SwinBody(body) if name.startswith("swin_") else body


def _skeleton(config: BackboneConfig, name: str, options: dict[str, Any]) -> Any:
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except TypeError as error:  # options are those of ResNets
        raise UsageError(
            f"backbone {name} cannot be built with norm={config.norm!r}, dilated={config.dilated}: {error}",
            hint="keep its own: --set model.backbone.norm=default",
        ) from error


def _architecture(name: str) -> str:
    """The timm architecture of a name such as `resnet50.tv_in1k`."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown("timm backbone", architecture, timm.list_models())
    return architecture


def _group_norm(channels: int, **placing: Any) -> nn.Module:
    return nn.GroupNorm(8, channels, **placing)


def _levels(model: Any, dilated: bool) -> list[int]:
    """The level of each map: log2 of its stride, except that a dilated last map is still called level 5."""
    levels = [int(r).bit_length() - 1 for r in model.feature_info.reduction()]
    return [*levels[:-1], levels[-1] + 1] if dilated else levels
