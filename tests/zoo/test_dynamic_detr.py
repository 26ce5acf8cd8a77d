"""Dynamic DETR as a whole: its choices, its recipes, odd input, and its export."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import detrcli
from detrcli.config import assign
from detrcli.errors import ModelError, UsageError
from detrcli.plugins import Recipe, resolve
from detrcli.plugins.backbones import BackboneConfig
from detrcli.train.optim import rate_at
from detrcli.train.plan import Request, make_plan
from detrcli.types import Output, Target
from detrcli_dynamic_detr.config import DynamicDetrConfig
from detrcli_dynamic_detr.fpn import FPN

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
    shares = [rate_at(epoch * 1000, short, 1000, 12_000) for epoch in (7, 8, 10, 11)]
    assert shares == pytest.approx([1.0, 0.1, 0.1, 0.01])
    assert make_plan(Request(data="coco", model="dynamic_detr", epochs=18)).recipe.drops == (12, 16)


def test_a_recipe_may_drop_once():
    one = Recipe(epochs=3, batch_size=1, lr_drop=2)
    assert [rate_at(epoch * 10, one, 10, 30) for epoch in range(3)] == [1.0, 1.0, 0.1]


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


def test_padding_does_not_move_boxes():
    """Boxes count from the picture's own size: the same answer covers the same share of the smaller picture."""
    model = tiny().eval()
    images = torch.randn(1, 3, 64, 96)
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, :, 64:] = True
    padded, start = model(images, mask), tiny(start_box=(0.5, 0.5, 2 / 3, 1.0)).eval()
    assert not torch.equal(padded.boxes, model(images).boxes)
    assert torch.isfinite(start(images, mask).boxes).all()


def test_boxes_are_detached_between_layers_but_their_start_is_learned():
    model = tiny()
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
    odd = replace(network, name="test_convnext", levels=(2, 3))
    assert tiny(backbone=network).backbone.strides == (16, 32)
    with pytest.raises(UsageError, match="halve one after another"):
        assign(TINY.config, {"backbone.dilated": True})
    with pytest.raises(UsageError, match="halve one after another"):
        assign(TINY.config, {"backbone.levels": [2, 4]})
    with pytest.raises((ModelError, ValueError)):
        tiny(backbone=replace(odd, name="test_vit", norm="default"))


def test_choices_that_do_not_fit_are_refused():
    for changes in ({"heads": 5}, {"norm_groups": 7}, {"dynamic_filters": 3}):
        with pytest.raises(UsageError):
            assign(TINY.config, changes)


def test_weights_of_fewer_classes_start_a_model_of_more(tmp_path):
    from detrcli.types import Categories
    from detrcli.weights.file import save

    assert save
    assert Categories
    assert tmp_path


class Tuple(nn.Module):
    """A detector that answers with tensors, as exports do."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.detector(images, mask)
        return output.logits, output.boxes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("form", "opset", "operator"), [("auto", 20, "DeformConv"), ("grid_sample", 18, "GridSample")]
)
def test_onnx_runtime_gives_the_same_answers(tmp_path, form, opset, operator):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Tuple(tiny(operators=form, offset_init="default", neighbour_order="resize_offsets")).eval()
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:] = True
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free})
    program = torch.export.export(model, (images, mask), dynamic_shapes=shapes)
    torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False).save(tmp_path / "model.onnx")
    used = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {operator, "RoiAlign"} <= used
    assert ("DeformConv" in used) == (form == "auto")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    names = [i.name for i in session.get_inputs()]
    for x, m in ((images, mask), (torch.randn(1, 3, 40, 70), torch.zeros(1, 40, 70, dtype=torch.bool))):
        answers = session.run(None, dict(zip(names, (x.numpy(), m.numpy()), strict=True)))
        for ours, theirs in zip(model(x, m), answers, strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-4)


def test_it_is_reachable_from_python():
    assert detrcli.list_models("dynamic_detr") == [
        "dynamic_detr/r50",
        "dynamic_detr/r50-sparse",
        "dynamic_detr/tiny",
    ]
