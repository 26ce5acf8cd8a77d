"""Programs without in-place operators: the same answers, whoever else sees the memory that the model changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from detrcli.export import functional


class Own(nn.Module):
    """Changes only what nobody else sees; hands tensors on in ways that mean nothing."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 6), nn.Dropout()

    def forward(self, x):
        y = self.linear(x)
        y += 1.5
        before = y * 2
        y.relu_().mul_(3)
        first, second = self.dropout(y).float().detach().chunk(2, -1)
        return first.to(torch.float64), second + before[:, 3:], (x > 0) & (x < 1) | (x.nan_to_num() > 2), y


class View(nn.Module):
    """What was taken of a tensor before changes with it."""

    def forward(self, x):
        y = x + 1
        part = y[:, 0]
        y.mul_(2)
        return part * 3, y


class Part(nn.Module):
    """A tensor changes with a part of it."""

    def forward(self, x):
        y = x * 1
        y[:, 1].add_(5)
        return y + 0.5


class Parts(nn.Module):
    """As `View`, by way of a list."""

    def forward(self, x):
        y = x + 1
        parts = y.split(2, 1)
        y.mul_(2)
        return parts[0] + parts[1]


class Input(nn.Module):
    """The caller's own tensor changes."""

    def forward(self, x):
        x.add_(1)
        return x * 2


class Mixed(nn.Module):
    """A tensor keeps its type when it changes; a new one would take the wider."""

    def forward(self, x):
        y = x.half()
        y.add_(x * 0.001)
        return y * 3


class Same(nn.Module):
    """Another name for a tensor is that tensor."""

    def forward(self, x):
        y = x + 1
        z = y.float()
        z.mul_(2)
        return y + z, y


def trace(model):
    return torch.export.export(
        model.eval(), (torch.randn(3, 4),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
    )


def in_place(program):
    return [n for n in program.graph.nodes if n.op == "call_function" and _mutable(n.target)]


def _mutable(target):
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


@pytest.mark.parametrize("kind", [Own, View, Part, Parts, Input, Mixed, Same])
def test_the_answers_stay(kind):
    model = kind()
    program = functional.ready(trace(model))
    with torch.no_grad():
        for rows in (2, 5):
            x = torch.randn(rows, 4)
            wanted, found = model(x.clone()), program.module()(x.clone())
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_what_nobody_else_sees_is_no_longer_changed_in_place():
    program = functional.ready(trace(Own()))
    assert in_place(program) == []
    left = {n.target for n in program.graph.nodes}
    assert not left & {
        torch.ops.aten.dropout.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.__and__.Tensor,
    }
    assert program.run_decompositions({}) is program
    assert program.run_decompositions({torch.ops.aten.relu.default: lambda x: x.clamp(min=0)}) is not program


@pytest.mark.parametrize("kind", [View, Part, Parts, Input, Mixed])
def test_what_others_see_is_left_to_the_exporter(kind):
    program = functional.ready(trace(kind()))
    assert in_place(program)
    assert in_place(program.run_decompositions({})) == []
