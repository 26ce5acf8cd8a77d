"""Dynamic DETR as a whole: its choices, its recipes, odd input, and its export."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import detrcli
from detrcli.config import assign
from detrcli.errors import CheckpointError, ModelError, UsageError
from detrcli.plugins import Recipe, resolve
from detrcli.plugins.backbones import BackboneConfig
from detrcli.train.optim import rate_at
from detrcli.train.plan import Request, make_plan
from detrcli.types import Categories, Output, Target
from detrcli.weights.load import load_state
from detrcli_dynamic_detr.config import DynamicDetrConfig
from detrcli_dynamic_detr.fpn import FPN
from detrcli_dynamic_detr.operators import deform_conv2d
from detrcli_dynamic_detr.pooling import Pooling, draw

PAGE = Path(__file__).parents[2] / "docs" / "models" / "dynamic_detr.md"
TINY = resolve("dynamic_detr/tiny")


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return TINY.family.build_model(replace(TINY.config, **changes), 3)


def loss_of(output: Output, targets: list[Target], config: DynamicDetrConfig = TINY.config) -> Tensor:
    return TINY.family.build_criterion(config, 3)(output, targets).total


def target(*boxes: tuple[float, ...]) -> Target:
    return Target(torch.zeros(len(boxes), dtype=torch.int64), torch.tensor(boxes).view(-1, 4))


def test_the_published_size():
    assert 58e6 <= resolve("dynamic_detr/r50").variant.params < 59e6


@pytest.mark.parametrize(
    ("epochs", "picked"), [(12, 12), (13, 12), (36, 36), (50, 50), (100, 50), (None, 12)]
)
def test_epochs_pick_the_schedule(epochs, picked):
    plan = make_plan(Request(data="coco", model="dynamic_detr", epochs=epochs))
    lengths = {r.source: r.epochs for r in resolve("dynamic_detr").variant.recipes}
    assert lengths[plan.recipe.source] == picked
    assert plan.recipe.epochs == (epochs or picked)


def test_the_1x_schedule_drops_twice_and_stretches():
    short = make_plan(Request(data="coco", model="dynamic_detr", epochs=12)).recipe
    assert short.drops == (8, 11)
    shares = [rate_at(epoch * 1000, short, 1000) for epoch in (7, 8, 10, 11)]
    assert shares == pytest.approx([1.0, 0.1, 0.1, 0.01])
    assert make_plan(Request(data="coco", model="dynamic_detr", epochs=18)).recipe.drops == (12, 16)


def test_a_recipe_may_drop_once():
    one = Recipe(epochs=3, batch_size=1, lr_drop=2)
    assert [rate_at(epoch * 10, one, 10) for epoch in range(3)] == [1.0, 1.0, 0.1]


def test_every_choice_is_on_the_model_page():
    page = PAGE.read_text()
    missing = [f.name for f in fields(DynamicDetrConfig) if f"`{f.name}`" not in page]
    assert not missing, f"docs/models/dynamic_detr.md does not explain {missing}"


def test_the_pyramid_halves_rounding_up():
    maps = [torch.randn(1, c, *size) for c, size in ((4, (13, 21)), (6, (7, 11)), (8, (4, 6)))]
    shapes = [tuple(x.shape[1:]) for x in FPN((4, 6, 8), 16, 2)(maps)]
    assert shapes == [(16, 13, 21), (16, 7, 11), (16, 4, 6), (16, 2, 3), (16, 1, 2)]


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (33, 17), (63, 65)])
@pytest.mark.parametrize("order", ["upsample_first", "resize_offsets"])
def test_pictures_of_any_size(size, order):
    output = tiny(neighbour_order=order).eval()(torch.randn(1, 3, *size))
    assert torch.isfinite(output.logits).all()
    assert ((output.boxes >= 0) & (output.boxes <= 1)).all()


def test_a_huge_aspect_ratio_trains():
    model = tiny()
    total = loss_of(model(torch.randn(1, 3, 8, 640)), [target((0.5, 0.5, 1.0, 0.01))])
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_boxes_that_diverge_keep_a_finite_loss_and_gradient():
    model = tiny()
    for head in model.box_heads:
        nn.init.constant_(head.answer.bias, 1e4)
    total = loss_of(model(torch.randn(1, 3, 64, 64)), [target((0.5, 0.5, 0.2, 0.2))])
    assert torch.isfinite(total)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_collapsed_boxes_keep_a_finite_loss_and_gradient():
    model = tiny()
    for head in model.box_heads:
        nn.init.constant_(head.answer.bias, -1e4)
    total = loss_of(model(torch.randn(1, 3, 64, 64)), [target((0.5, 0.5, 0.0, 0.0), (0.3, 0.3, 0.2, 0.2))])
    assert torch.isfinite(total)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_picture_that_is_not_finite_is_answered_so_and_nothing_crashes():
    """Torchvision's deformable convolution reads at the address of a NaN offset."""
    for form in ("auto", "operator", "grid_sample"):
        model = tiny(operators=form, offset_init="default").eval()
        images = torch.randn(2, 3, 64, 64)
        whole = model(images)
        images[0, :, 3, 4] = float("nan")
        output = model(images)
        assert not torch.isfinite(output.logits[0]).all()
        torch.testing.assert_close(output.logits[1], whole.logits[1])


def test_boxes_count_from_the_picture_without_its_padding():
    """A box of the whole picture is pooled up to where the padding begins, and answered as 1 x 1."""
    model = tiny(neighbour_order="resize_offsets").eval()
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, :, 64:] = True
    pooled = []
    model.pool = lambda canvas, boxes, sizes: (
        pooled.append((boxes, sizes)) or Pooling.__call__(tiny().pool, canvas, boxes, sizes)
    )
    output = model(images, mask)
    assert [sizes.tolist() for _, sizes in pooled] == [[[64, 64]]] * 2
    torch.testing.assert_close(output.boxes, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(1, 10, 4))


def test_boxes_are_detached_between_layers_but_their_start_is_learned():
    model = tiny(box_init="xavier")
    output = model(torch.randn(1, 3, 64, 64))
    (first,) = output.aux
    assert torch.autograd.grad(first.boxes.sum(), model.box_embed.weight, retain_graph=True)[0].any()
    reached = torch.autograd.grad(output.boxes.sum(), model.box_embed.weight, allow_unused=True)[0]
    assert reached is None
    through = torch.autograd.grad(output.boxes.sum(), model.query_embed.weight)[0]  # queries are not detached
    assert through.any()


def test_softmax_reading():
    config = replace(TINY.config, class_loss="softmax")
    model = TINY.family.build_model(config, 3)
    output = model(torch.randn(1, 3, 64, 64))
    assert output.logits.shape[-1] == 4
    assert torch.isfinite(loss_of(output, [target((0.5, 0.5, 0.2, 0.2))], config))
    sizes = torch.tensor([[64, 64]])
    assert len(TINY.family.postprocess(config, output, sizes)[0]) == config.num_queries


def test_a_backbone_with_other_strides_is_refused():
    network = BackboneConfig(name="test_resnet", levels=(4, 5), norm="group", frozen=(), pretrained=None)
    assert tiny(backbone=network).backbone.strides == (16, 32)
    for change in ({"backbone.dilated": True}, {"backbone.levels": [2, 4]}):
        with pytest.raises(UsageError, match="halve one after another"):
            assign(TINY.config, change)
    with pytest.raises(UsageError, match="levels"):
        tiny(backbone=replace(network, name="test_vit", norm="default"))
    with torch.device("meta"), pytest.raises(ModelError, match=r"strides \(14,\)"):
        tiny(backbone=replace(network, name="vit_small_patch14_dinov2", norm="default", levels=(3,)))


def test_choices_that_do_not_fit_are_refused():
    for changes in ({"heads": 5}, {"norm_groups": 7}, {"dynamic_filters": 3}):
        with pytest.raises(UsageError):
            assign(TINY.config, changes)


def test_weights_of_other_classes_start_a_model():
    """Class rows are taken over by name, the others made anew; everything else must fit."""
    old, new = Categories((1, 2), ("cat", "dog")), Categories((1, 2, 3), ("dog", "emu", "cat"))
    donor = TINY.family.build_model(TINY.config, 2)
    for head in donor.class_heads:
        nn.init.normal_(head.answer.bias)
    model = tiny()
    report = load_state(model, donor.state_dict(), TINY.family, TINY.config, classes=(old, new))
    assert len(report.remade) == 2 * len(model.class_heads)
    for ours, theirs in zip(model.class_heads, donor.class_heads, strict=True):
        assert torch.equal(ours.answer.bias[[2, 0]], theirs.answer.bias)
    with pytest.raises(CheckpointError, match="class_heads"):
        load_state(tiny(), donor.state_dict(), TINY.family, TINY.config)


class LayerAndPooling(nn.Module):
    """All that is not plain in the model: one layer of the encoder, and boxes pooled from its answer."""

    def __init__(self) -> None:
        super().__init__()
        model = tiny(offset_init="default", neighbour_order="resize_offsets")
        self.layer, self.pool = model.encoder.layers[0], model.pool

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        return self.pool(draw(self.layer([p3, p4, p5])), boxes, sizes)


class Convolution(nn.Module):
    def forward(self, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return deform_conv2d(x, offset, mask, weight, bias, stride=2, form="grid_sample")


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], path: Path, opset: int
) -> tuple[list[Tensor], set[str]]:
    """What the module answers in ONNX Runtime, and the operators its graph uses."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.export.export(module, inputs)
    torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False).save(path)
    session = runtime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    answers = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(a) for a in answers], {n.op_type for n in onnx.load(path).graph.node}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_runtime_gives_the_same_answers(tmp_path):
    maps = [torch.randn(2, 64, *size) for size in ((9, 13), (5, 7), (3, 4))]
    given = (*maps, torch.rand(2, 6, 4), torch.tensor([[72, 104], [60, 100]]))
    module = LayerAndPooling().eval()
    answers, used = exported(module, given, tmp_path / "model.onnx", 20)
    assert {"DeformConv", "RoiAlign"} <= used
    torch.testing.assert_close(answers[0], module(*given), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_runtime_without_deform_conv_gets_grid_sample(tmp_path):
    given = (
        torch.randn(2, 4, 7, 9),
        torch.randn(2, 18, 4, 5),
        torch.rand(2, 9, 4, 5),
        torch.randn(4, 4, 3, 3),
        torch.randn(4),
    )
    answers, used = exported(Convolution(), given, tmp_path / "conv.onnx", 18)
    assert "GridSample" in used
    assert "DeformConv" not in used
    wanted = deform_conv2d(*given, stride=2, form="operator")
    torch.testing.assert_close(answers[0], wanted, rtol=0, atol=1e-4)


def test_it_is_reachable_from_python():
    assert detrcli.list_models("dynamic_detr") == [
        "dynamic_detr/r50",
        "dynamic_detr/r50-sparse",
        "dynamic_detr/tiny",
    ]
