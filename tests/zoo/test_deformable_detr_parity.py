"""Files written by the real transformers package load here and give the same boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detrcli.plugins.registry import Model, resolve
from detrcli.weights.load import load_state

pytestmark = pytest.mark.parity
SMALL = {"width": 64, "ffn": 96, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 30, "heads": 4}
CLASSES = 11


def declared(variant: str) -> Model:
    """The variant, narrow and shallow; proposals unmasked, as transformers has it."""
    model = resolve(f"deformable_detr/{variant}")
    return model.configured(replace(model.config, **SMALL, mask_proposals=False))


def theirs(model: Model) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = model.config
    network = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            use_timm_backbone=True,
            use_pretrained_backbone=False,
            backbone="resnet50",
            dilation=config.backbone.dilated,
            num_feature_levels=config.levels,
            d_model=config.width,
            encoder_ffn_dim=config.ffn,
            decoder_ffn_dim=config.ffn,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads,
            num_queries=config.num_queries,
            two_stage=config.two_stage,
            two_stage_num_proposals=config.num_queries,
            with_box_refine=config.refine,
            num_labels=CLASSES,
        )
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # fresh heads and offsets are constant: move everything
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                spread = 0.3 if tensor.dim() == 1 else 0.8 * tensor[0].numel() ** -0.5
                tensor.add_(torch.randn(tensor.shape, generator=generator) * spread)
                if tensor.dim() == 1 and "running_var" in str(tensor.shape):
                    tensor.abs_()
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_().add_(0.5)
    return network.eval()


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 160, 192, generator=generator)
    mask = torch.zeros(2, 160, 192, dtype=torch.bool)
    mask[0, 129:], mask[1, :, 160:] = True, True
    images[mask[:, None].expand_as(images)] = 0
    return images, mask


@pytest.mark.parametrize("original", [True, False], ids=["classic", "new"])
@pytest.mark.parametrize(
    "variant", ["r50-two-stage", "r50-refine", "r50", "r50-single-scale", "r50-single-scale-dc5"]
)
def test_a_saved_model_of_transformers_gives_the_same_boxes(
    variant: str, original: bool, tmp_path: Path
) -> None:
    model = declared(variant)
    reference = theirs(model)
    reference.save_pretrained(tmp_path, save_original_format=original)
    ours = model.build(CLASSES).eval()
    report = load_state(ours, load_file(tmp_path / "model.safetensors"), model.family, model.config)
    assert report.layout == "hub"
    images, mask = pictures()
    with torch.no_grad():
        expected, output = reference(images, pixel_mask=(~mask).long()), ours(images, mask)
    spread = expected.pred_boxes.std(1).mean()
    assert spread > 1e-2, "the answers differ between queries"
    torch.testing.assert_close(output.logits, expected.logits, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.boxes, expected.pred_boxes, atol=5e-5, rtol=0)
