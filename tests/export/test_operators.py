"""Operators that the ONNX exporter writes wrongly or not at all, at sizes other than the traced one."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import nn
from torch.onnx._internal.fx.passes import type_promotion

from detrcli import ops
from detrcli.export import layers, shortcuts
from detrcli.export import onnx as onnx_file
from detrcli.export import program as program_file
from detrcli.export.description import Description
from detrcli.export.graph import Graph, trace
from detrcli.export.plan import Request
from detrcli.nn.swin import PaddedBlock, PaddedMerging, padded
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories, Output

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
PICTURES = Preprocess(short_side=500, long_side=900)


def written(model, **options):
    """The traced program, and what the writer makes of it."""
    request = Request(format="onnx", **options)
    program = trace(Graph(model, request, PICTURES, lambda output, sizes: []), request, PICTURES)
    return program, onnx_file.convert(program, about(request))


def about(request):
    return Description(
        model="a/b", config={}, categories=Categories((), ()), preprocess=PICTURES, format=request.format,
        precision="float16" if request.half else "float32",
    )  # fmt: skip


def session_of(file):
    return onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])


class Windows(nn.Module):
    """A detector that looks through two layers of Swin, a query for each place of its map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(
            *(SwinTransformerBlock(16, (7, 7), 4, window_size=7, shift_size=s, always_partition=True) for s in (0, 3)),
            PatchMerging(16),
        )  # fmt: skip
        for block in self.blocks:
            block.__class__ = PaddedMerging if isinstance(block, PatchMerging) else PaddedBlock

    def forward(self, images, mask):
        x = padded(images.permute(0, 2, 3, 1), (4, 4)).permute(0, 3, 1, 2)
        x = self.blocks(self.conv(x).permute(0, 2, 3, 1)).flatten(1, 2)
        return Output(x[:, :, :4], x[:, :, 4:8].sigmoid())


def test_a_pt2_takes_pictures_of_whole_windows_and_of_others(tmp_path):
    """It is traced with a map that windows do not divide; torch binds slices to what they leave out, unless told."""
    model, request = Windows().eval(), Request(format="pt2")
    traced = trace(Graph(model, request, PICTURES, lambda output, sizes: []), request, PICTURES)
    program_file.write(tmp_path / "windows.pt2", traced, about(request))
    with (tmp_path / "windows.pt2").open("rb") as file:
        program = program_file.read(file, "windows.pt2").module()
    for batch, *size in ((2, 112, 140), (1, 112, 101), (3, 57, 84), (1, 28, 28), (2, 40, 200)):
        images, mask = torch.randn(batch, 3, *size), torch.zeros(batch, *size, dtype=torch.bool)
        with torch.no_grad():
            torch.testing.assert_close(program(images, mask)["logits"], model(images, mask).logits)


class Pools(nn.Module):
    """A detector of 35 queries, one for each part of the picture."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.pool = nn.AdaptiveAvgPool2d((7, 5))

    def forward(self, images, mask):
        x = self.pool(self.conv(images)).flatten(2).mT
        return Output(x[:, :, :4], x[:, :, 4:].sigmoid())


def test_adaptive_pooling_follows_the_size():
    """The exporter's own form reads the places that the traced size had."""
    model = Pools()
    session = session_of(written(model)[1])
    for size in ((64, 96), (32, 200), (100, 61), (20, 16)):
        images, mask = torch.randn(2, 3, *size), torch.zeros(2, *size, dtype=torch.bool)
        with torch.no_grad():
            wanted = model(images, mask).logits
        [found] = session.run(["logits"], {"images": images.numpy(), "mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted)


HEADS, DEPTH, LEVELS, POINTS, QUERIES = 2, 4, 3, 3, 5


class Attends(nn.Module):
    """A detector that looks at three levels in all ways there are: with given weights, with keys of its own, with shared ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, HEADS * DEPTH, 4, 4)
        self.offsets = nn.Parameter(2 * torch.randn(1, QUERIES, HEADS, LEVELS, POINTS, 2))
        self.logits = nn.Parameter(torch.randn(1, QUERIES, HEADS, LEVELS * POINTS))
        self.reference = nn.Parameter(torch.rand(1, QUERIES, LEVELS, 4))

    def forward(self, images, mask):
        maps = [nn.functional.avg_pool2d(self.conv(images), size) for size in (1, 2, 3)]
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        rows = torch.cat([x.flatten(2).mT for x in maps], 1).unflatten(2, (HEADS, DEPTH))
        padding = rows[..., 0, 0] > 0.3
        reference, offsets, logits = (
            x.expand(images.shape[0], *[-1] * (x.ndim - 1))
            for x in (self.reference, self.offsets, self.logits)
        )
        query = rows[:, :QUERIES]
        found = ops.msda_fused(rows, shapes, reference, offsets, logits, padding)
        shared = ops.kda(query, rows, rows, shapes, reference, offsets, padding)
        keys = ops.kda(query, rows.flip(3), rows, shapes, reference, offsets, padding)
        return Output(torch.cat((found, shared), 2), keys[..., :4])


def test_deformable_attention_is_written_in_standard_operators():
    torch.manual_seed(0)
    model = Attends().eval()
    _, file = written(model)
    assert {node.domain for node in file.graph.node} == {""}
    session = session_of(file)
    for batch, height, width in ((2, 64, 96), (1, 50, 111)):
        images, mask = (
            torch.randn(batch, 3, height, width),
            torch.zeros(batch, height, width, dtype=torch.bool),
        )
        with torch.no_grad(), ops.use("reference"):
            wanted = model(images, mask)
        found = session.run(["logits", "boxes"], {"images": images.numpy(), "mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(found[0]), wanted.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(found[1]), wanted.boxes, rtol=0, atol=1e-5)


class Cleans(nn.Module):
    """A detector whose numbers get lost on the way and are put back; `known` is whether the exporter knows all of its operators."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, images, mask):
        x = images[..., ::4, ::4].flatten(2)
        x = x.mT if self.known else x.movedim(1, 2)
        roots, inverse = (
            (1 - 4 * x).sign().sqrt().nan_to_num(0.5),
            (1 / x.relu().sign()).nan_to_num(posinf=7.0),
        )
        overflowing = (x.double() * 1e300).to(x.dtype).nan_to_num()
        return Output(torch.cat((roots, inverse), 2), overflowing * 0 + x.sign())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_numbers_that_got_lost_are_put_back_as_in_torch(known, half):
    torch.manual_seed(0)
    model = Cleans(known)
    session = session_of(written(model, half=half)[1])
    images, mask = torch.randn(2, 3, 40, 56), torch.zeros(2, 40, 56, dtype=torch.bool)
    wanted = model(images.half() if half else images, mask)
    found = session.run(["logits", "boxes"], {"images": images.numpy(), "mask": mask.numpy()})
    assert set(wanted.logits.unique().tolist()) == {0.5, 1, 7}
    assert set(wanted.boxes.unique().tolist()) == {-1, 1}
    torch.testing.assert_close(torch.from_numpy(found[0]), wanted.logits.float(), rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(found[1]), wanted.boxes.float(), rtol=0, atol=0)


def test_layers_as_one_operator_have_the_shapes_of_their_answers():
    x, weight, bias = torch.randn(2, 3, 5, 4), torch.randn(6, 4), torch.randn(6)
    torch.library.opcheck(layers.linear, (x, weight, bias), test_utils="test_faketensor")
    torch.library.opcheck(layers.linear, (x[0, 0], weight), test_utils="test_faketensor")
    torch.library.opcheck(layers.layer_norm, (x, [5, 4]), test_utils="test_faketensor")
    torch.library.opcheck(layers.matmul, (x, torch.randn(3, 4, 7)), test_utils="test_faketensor")
    torch.library.opcheck(layers.cumsum, (x, 1), test_utils="test_faketensor")


def test_what_is_no_layer_of_rows_is_left_to_torch():
    x, vector = torch.randn(2, 5, 4), torch.randn(4)
    with layers.AsOne():
        assert torch.matmul(input=x, other=vector).shape == (2, 5)
        assert (x @ vector).shape == (2, 5)
        assert nn.functional.linear(x, vector).shape == (2, 5)
        assert nn.functional.linear(input=x, weight=vector[None]).shape == (2, 5, 1)
        assert (x > 0).cumsum(1).dtype == torch.int64
        assert x.cumsum(1, dtype=torch.float64).dtype == torch.float64


class Layers(nn.Module):
    """A detector of one query, of each layer that is one operator while it is traced."""

    def __init__(self):
        super().__init__()
        self.linear, self.plain = nn.Linear(3, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.bare = nn.LayerNorm(8), nn.LayerNorm((1, 8), elementwise_affine=False)

    def forward(self, images, mask):
        x = self.norm(self.plain(self.linear(images.flatten(2).mT)))
        x = self.bare((x.mT @ x).cumsum(-1)[:, :1])
        return Output(x[:, :, :4], x[:, :, 4:].sigmoid())


def test_layers_are_traced_as_one_operator_and_written_as_in_torch():
    model = Layers()
    program, file = written(model)
    traced = {str(node.target) for node in program.graph.nodes}
    assert {f"detrcli.{name}.default" for name in ("linear", "layer_norm", "matmul", "cumsum")} <= traced
    session = session_of(file)
    images, mask = torch.randn(3, 3, 50, 70), torch.zeros(3, 50, 70, dtype=torch.bool)
    logits, boxes = session.run(["logits", "boxes"], {"images": images.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        expected = model(images, mask)
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(boxes), expected.boxes, rtol=1e-4, atol=1e-4)


class Mixed(nn.Module):
    """A detector of one query that leaves it to torch which type an answer has."""

    def forward(self, images, mask):
        places = torch.arange(images.shape[3])
        x = (images.mean((1, 2)) + places) / places.shape[0] + (places / 7).sqrt()
        x = torch.where(x > 1, x * mask.any(1).int(), places)[:, None, :4]
        return Output(x, (x / 2 + 1).sigmoid())


def test_a_torch_without_the_door_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(type_promotion, "_TypePromotionInterpreter")
    with shortcuts.types_without_running():
        pass


def test_types_agree_as_if_the_exporter_had_run_every_operator_again():
    _, slow = written(Mixed())
    with shortcuts.types_without_running():
        _, quick = written(Mixed())
    assert [(n.op_type, list(n.input), list(n.output)) for n in quick.graph.node] == [
        (n.op_type, list(n.input), list(n.output)) for n in slow.graph.node
    ]
    assert sum(node.op_type == "Cast" for node in quick.graph.node) > 2
    images, mask = torch.rand(2, 3, 40, 70), torch.rand(2, 40, 70) > 0.5
    [found] = session_of(quick).run(["logits"], {"images": images.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Mixed()(images, mask).logits)
