"""The layouts that files on the Hub have, as far as they do not depend on the paper: how transformers names things.

Three generations name the same tensors differently. Each has a map to the oldest, `classic`, so that a paper declares one map:

    key_maps = {"official": …, "hub": hub, "hub-new": lambda c: HUB_NEW | hub(c), "hub-resnet": lambda c: HUB_RESNET | hub(c)}
"""

from __future__ import annotations

from detrcli.weights.keymap import Drop, KeyMap, Rename, Rule

COUNTERS = (
    Drop("**.num_batches_tracked"),  # of batch norms that are frozen here
    Drop("**.total_ops"),  # left by profilers in published checkpoints
    Drop("**.total_params"),
)

# transformers >= 5 in memory, on disk with save_original_format=False
HUB_NEW = KeyMap(
    (
        Rename("model.backbone.model.**", "model.backbone.conv_encoder.model.**"),
        Rename("**.mlp.fc1.*", "**.fc1.*"),
        Rename("**.mlp.fc2.*", "**.fc2.*"),
        Rename("**.o_proj.*", "**.out_proj.*"),
    )
)

# segmentation models hold the detector under a prefix, and a mask head that is not ours
HUB_SEGMENTATION = KeyMap(
    (Drop("bbox_attention.**"), Drop("mask_head.**"), Rename("detr.**", "**")),
)


def _resnet(blocks: int = 3) -> tuple[Rule, ...]:
    """transformers' own ResNet to torchvision's names: stage s is layer s + 1, layer k is conv k + 1 and bn k + 1."""
    body, stage = "model.backbone.conv_encoder.model", "model.backbone.conv_encoder.model.encoder.stages"
    rules = [
        Rename(f"{body}.embedder.embedder.convolution.*", f"{body}.conv1.*"),
        Rename(f"{body}.embedder.embedder.normalization.*", f"{body}.bn1.*"),
    ]
    for s in range(4):
        ours, theirs = f"{body}.layer{s + 1}.*", f"{stage}.{s}.layers.*"
        rules += [
            Rename(f"{theirs}.shortcut.convolution.*", f"{ours}.downsample.0.*"),
            Rename(f"{theirs}.shortcut.normalization.*", f"{ours}.downsample.1.*"),
        ]
        for k in range(blocks):
            rules += [
                Rename(f"{theirs}.layer.{k}.convolution.*", f"{ours}.conv{k + 1}.*"),
                Rename(f"{theirs}.layer.{k}.normalization.*", f"{ours}.bn{k + 1}.*"),
            ]
    return tuple(rules)


HUB_RESNET = KeyMap(_resnet())
