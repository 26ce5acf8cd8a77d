"""What files have in common that does not depend on the paper: leftovers, and the spellings that transformers has used.

A paper declares one map for the Hub, from the names that repositories hold today:

    HUB = HUB_SPELLINGS | KeyMap((Rename("model.encoder.**", "encoder.**"), …))
"""

from __future__ import annotations

from collections.abc import Iterator

from detrcli.weights.keymap import Drop, KeyMap, Rename, Rule

COUNTERS = (
    Drop("**.num_batches_tracked"),  # of batch norms that are frozen here
    Drop("**.total_ops"),  # left by profilers in published checkpoints
    Drop("**.total_params"),
)

# segmentation models hold the detector under a prefix, and a mask head that is not ours
_SEGMENTATION = (Drop("bbox_attention.**"), Drop("mask_head.**"), Rename("detr.**", "**", back=False))

# transformers >= 5 in memory; on disk only with save_original_format=False
_NEW = (
    Rename("model.backbone.model.**", "model.backbone.conv_encoder.model.**", back=False),
    Rename("**.layers.*.mlp.fc1.*", "**.layers.*.fc1.*", back=False),  # not the MLPs of a backbone's blocks
    Rename("**.layers.*.mlp.fc2.*", "**.layers.*.fc2.*", back=False),
    Rename("**.o_proj.*", "**.out_proj.*", back=False),
)

_BODY = "model.backbone.conv_encoder.model"


def _resnet() -> Iterator[Rule]:
    """transformers' own ResNet (bottleneck blocks) in torchvision's names: stage s is layer s + 1, layer k is conv k + 1."""
    yield Rename(f"{_BODY}.embedder.embedder.convolution.*", f"{_BODY}.conv1.*", back=False)
    yield Rename(f"{_BODY}.embedder.embedder.normalization.*", f"{_BODY}.bn1.*", back=False)
    for s in range(4):
        ours, theirs = f"{_BODY}.layer{s + 1}.*", f"{_BODY}.encoder.stages.{s}.layers.*"
        yield Rename(f"{theirs}.shortcut.convolution.*", f"{ours}.downsample.0.*", back=False)
        yield Rename(f"{theirs}.shortcut.normalization.*", f"{ours}.downsample.1.*", back=False)
        for k in range(3):
            yield Rename(f"{theirs}.layer.{k}.convolution.*", f"{ours}.conv{k + 1}.*", back=False)
            yield Rename(f"{theirs}.layer.{k}.normalization.*", f"{ours}.bn{k + 1}.*", back=False)


HUB_SPELLINGS = KeyMap((*COUNTERS, *_SEGMENTATION, *_NEW, *_resnet()))
