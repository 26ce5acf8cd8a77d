"""Operators that the ONNX exporter writes wrongly or not at all, at sizes other than the traced one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrcli.export import onnx as onnx_file
from detrcli.export.description import Description
from detrcli.export.graph import Graph, trace
from detrcli.export.plan import Request
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories, Output

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
PICTURES = Preprocess(short_side=500, long_side=900)


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
    model, request = Pools(), Request(format="onnx")
    program = trace(Graph(model, request, PICTURES, lambda output, sizes: []), request, PICTURES)
    about = Description(
        model="a/b", config={}, categories=Categories((), ()), preprocess=PICTURES, format="onnx"
    )
    file = onnx_file.convert(program, about).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in ((64, 96), (32, 200), (100, 61), (20, 16)):
        images, mask = torch.randn(2, 3, *size), torch.zeros(2, *size, dtype=torch.bool)
        with torch.no_grad():
            wanted = model(images, mask).logits
        [found] = session.run(["logits"], {"images": images.numpy(), "mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted)
