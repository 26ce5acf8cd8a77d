"""The parts of Dynamic DETR against the code they come from: Dynamic Head and Sparse R-CNN, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrcli_dynamic_detr.config import DynamicDetrConfig
from detrcli_dynamic_detr.decoder import DynamicDecoderLayer, DynamicFilters, Head, move
from detrcli_dynamic_detr.encoder import DynamicEncoderLayer, DyReLU, ScaleAttention

GOLDENS = Path(__file__).parents[1] / "goldens" / "dynamic_detr"
LEVELS = ("p3", "p4", "p5")
CONFIG = DynamicDetrConfig(
    width=32, norm_groups=16, heads=4, dynamic_filters=2, filter_width=8, ffn=64, class_layers=1, box_layers=3
)
DYCONV = {
    "DyConv.0.conv.": "coarser.",
    "DyConv.1.conv.": "same.",
    "DyConv.2.conv.": "finer.",
    "DyConv.0.bn.": "coarser.norm.",
    "DyConv.1.bn.": "same.norm.",
    "DyConv.2.bn.": "finer.norm.",
    "AttnConv.1.": "scale_attention.weigh.",
    "relu.fc.0.": "activation.squeeze.",
    "relu.fc.2.": "activation.excite.",
    "fc.0.": "squeeze.",
    "fc.2.": "excite.",
}
FILTERS = {
    "dynamic_layer.": "generate.",
    "norm1.": "norms.0.",
    "norm2.": "norms.1.",
    "out_layer.": "output.",
    "norm3.": "output_norm.",
}
LAYER = {
    **{f"inst_interact.{old}": f"filters.{new}" for old, new in FILTERS.items()},
    "linear1.": "ffn.0.",
    "linear2.": "ffn.2.",
}


@pytest.fixture(scope="module")
def head() -> dict[str, Tensor]:
    return load_file(GOLDENS / "dynamic_head.safetensors")


@pytest.fixture(scope="module")
def rcnn() -> dict[str, Tensor]:
    return load_file(GOLDENS / "sparse_rcnn_head.safetensors")


def fill(module: nn.Module, golden: dict[str, Tensor], prefix: str, names: dict[str, str]) -> nn.Module:
    """The module with the golden's weights; all of them, and nothing else."""
    module = module.double()
    mine = module.state_dict()
    found = {}
    for key, value in golden.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for old, new in names.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            found[name] = value.view(mine[name].shape)
    module.load_state_dict(found)
    return module


def same(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)


def test_dyrelu_and_its_gradient(head):
    module = fill(DyReLU(32, 4), head, "dyrelu.weight.", DYCONV)
    x = head["dyrelu.input"].requires_grad_()
    out = module(x)
    same(out, head["dyrelu.output"])
    out.backward(head["dyrelu.grad_output"])
    same(x.grad, head["dyrelu.grad_input"])


def test_scale_attention(head):
    layer = fill(DynamicEncoderLayer(CONFIG), head, "dyconv.weight.", DYCONV)
    module: ScaleAttention = layer.scale_attention
    branches = [head["scale_attn.mid"], head["scale_attn.finer"]]
    weights = torch.stack([module.weight_of(branch) for branch in branches])
    same(weights, head["scale_attn.weights"].flatten(2))
    same(module(branches), head["scale_attn.output"])


def test_one_convolution_predicts_offsets_and_masks_before_their_sigmoid(head):
    layer = fill(DynamicEncoderLayer(CONFIG), head, "dyconv.weight.", DYCONV)
    offset, mask = layer.sampling(head["dyconv.input.p4"])
    golden = head["scale_attn.offset_mask_p4"]
    same(offset, golden[:, :18])
    same(mask, golden[:, 18:].sigmoid())


@pytest.mark.parametrize("form", ["auto", "operator", "grid_sample"])
@pytest.mark.parametrize("order", ["upsample_first", "resize_offsets"])
def test_dyconv_in_both_orders(head, order, form):
    config = replace(CONFIG, neighbour_order=order, operators=form)
    layer = fill(DynamicEncoderLayer(config), head, "dyconv.weight.", DYCONV)
    out = layer([head[f"dyconv.input.{level}"] for level in LEVELS])
    for level, actual in zip(LEVELS, out, strict=True):
        same(actual, head[f"dyconv.ours_{order}.{level}"])
    same(out[-1], head["dyconv.official_output.p5"])


def test_gradients_of_dyconv_are_those_of_the_operator(head):
    """The official gradients are of no use: they flow through the wrongly read offsets to every level."""
    layer = fill(DynamicEncoderLayer(CONFIG), head, "dyconv.weight.", DYCONV)
    maps = [head[f"dyconv.input.{level}"].requires_grad_() for level in LEVELS]
    answers = {}
    for form in ("auto", "operator"):
        for conv in (layer.coarser, layer.same, layer.finer):
            conv.form = form
        loss = sum(
            (y * head[f"dyconv.grad_output.{k}"]).sum() for y, k in zip(layer(maps), LEVELS, strict=True)
        )
        answers[form] = torch.autograd.grad(loss, [*maps, *layer.parameters()])
    for ours, torchvision in zip(answers["auto"], answers["operator"], strict=True):
        same(ours, torchvision)


def test_dynamic_filters_and_their_gradients(rcnn):
    module = fill(DynamicFilters(32, 8, 2, 49), rcnn, "dynamicconv.weight.", FILTERS)
    query = rcnn["dynamicconv.pro_features"][0].requires_grad_()
    features = rcnn["dynamicconv.roi_features"].transpose(0, 1).requires_grad_()
    out = module(query, features)
    same(out, rcnn["dynamicconv.output"])
    grads = torch.autograd.grad(out, (query, features), rcnn["dynamicconv.grad_output"])
    same(grads[0], rcnn["dynamicconv.grad_pro"][0])
    same(grads[1], rcnn["dynamicconv.grad_roi"].transpose(0, 1))


def test_one_layer_of_the_decoder(rcnn):
    def part(module: nn.Module, prefixes: dict[str, str]) -> nn.Module:
        wanted = tuple(prefixes)
        weights = {k: v for k, v in rcnn.items() if k.removeprefix("rcnnhead.weight.").startswith(wanted)}
        return fill(module, weights, "rcnnhead.weight.", prefixes)

    own = {"self_attn.": "self_attn.", "norm1.": "norm1.", "norm2.": "norm2.", "norm3.": "norm3.", **LAYER}
    layer = part(DynamicDecoderLayer(CONFIG), own)
    class_head = part(Head(32, 1, 5), {"cls_module.": "hidden.", "class_logits.": "answer."})
    box_head = part(Head(32, 3, 4), {"reg_module.": "hidden.", "bboxes_delta.": "answer."})
    features = rcnn["rcnnhead.roi_features"].flatten(2).mT.unflatten(0, (2, 6))
    query = layer(rcnn["rcnnhead.pro_features"], features)
    same(query, rcnn["rcnnhead.obj_features"].view(2, 6, 32))
    same(class_head(query), rcnn["rcnnhead.class_logits"])
    boxes = move(xyxy_to_cxcywh(rcnn["rcnnhead.boxes"]) / 1000, box_head(query), CONFIG.delta_weights)
    same(cxcywh_to_xyxy(boxes) * 1000, rcnn["rcnnhead.pred_boxes"])


def test_deltas(rcnn):
    boxes = xyxy_to_cxcywh(rcnn["apply_deltas.boxes"]) / 1000
    moved = move(boxes, rcnn["apply_deltas.deltas"], CONFIG.delta_weights)
    golden = rcnn["apply_deltas.output"] / 1000
    torch.testing.assert_close(cxcywh_to_xyxy(moved), golden, rtol=1e-12, atol=1e-9)
