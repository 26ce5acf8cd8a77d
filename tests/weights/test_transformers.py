"""The real transformers package writes, we read, and both give the same boxes: every layout it can write today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import detrcli
from detrcli.plugins.backbones import BackboneConfig
from detrcli.weights.load import count_classes

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 7}
SMALL |= {
    f"{part}_{kind}": n
    for part in ("encoder", "decoder")
    for kind, n in (("attention_heads", 4), ("ffn_dim", 48))
}


def theirs(kind: str) -> Any:
    """A DETR of transformers with random weights and 5 classes."""
    if kind == "resnet":
        backbone = transformers.ResNetConfig(out_features=["stage4"])
        config = transformers.DetrConfig(
            use_timm_backbone=False, backbone_config=backbone, num_labels=5, **SMALL
        )
    else:
        config = transformers.DetrConfig(
            backbone="resnet50", use_timm_backbone=True, use_pretrained_backbone=False, num_labels=5, **SMALL
        )
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config).eval()
    for (
        name,
        tensor,
    ) in model.state_dict().items():  # every tensor speaks: fresh ones hold many ones and zeros
        if tensor.is_floating_point() and (
            "norm" in name or "bn" in name or "downsample.1" in name or tensor.dim() == 1
        ):
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["classic", "new", "resnet"])
def test_detr_as_transformers_saves_it_loads_and_answers_the_same(tmp_path: Path, kind: str):
    model = theirs(kind)
    model.save_pretrained(tmp_path, save_original_format=kind != "new")
    ours = detrcli.create_model(
        "detr/r50",
        num_classes=5,
        width=32,
        heads=4,
        ffn=48,
        encoder_layers=2,
        decoder_layers=2,
        num_queries=7,
        backbone=BackboneConfig(),
    ).eval()
    report = detrcli.load_weights(ours, tmp_path / "model.safetensors")
    assert (report.layout, report.missing, report.unexpected) == ("hub", (), ())
    images = torch.randn(2, 3, 96, 128)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:] = True
    with torch.no_grad():
        expected = model(images, pixel_mask=(~mask).long())
        found = ours(images, mask)
    assert torch.allclose(found.boxes, expected.pred_boxes, atol=2e-5)
    assert torch.allclose(found.logits, expected.logits, atol=2e-4)
    declared = ours.detrcli_model
    blank = declared.build(91)
    assert count_classes(model.state_dict(), declared.family, declared.config, 91, blank) == 5


def test_large_models_in_parts_load_too(tmp_path: Path):
    model = theirs("classic")
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = detrcli.create_model(
        "detr/r50",
        num_classes=5,
        width=32,
        heads=4,
        ffn=48,
        encoder_layers=2,
        decoder_layers=2,
        num_queries=7,
    )
    detrcli.load_weights(ours, tmp_path / "model.safetensors.index.json")
    detrcli.load_weights(ours, tmp_path)
    assert torch.equal(ours.class_head.weight, model.class_labels_classifier.weight)
