"""Exported graphs answer the same under ONNX Runtime, in both plain-torch forms and from the native operator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from detrcli import ops
from detrcli.ops.msda import msda_plain
from tests.ops.cases import make_case

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Attend(torch.nn.Module):
    def __init__(self, kind: str, form: ops.Mode) -> None:
        super().__init__()
        self.case = make_case(kind, depth=8).map(lambda t: t.float())
        self.form, self.names = form, list(self.case.floats())

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.case.floats().values())

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.case(self.form, **dict(zip(self.names, tensors, strict=True)))


def runtime_answer(program: torch.onnx.ONNXProgram, inputs: tuple[Tensor, ...], path: Path) -> Tensor:
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("kind", ["msda", "msda_fused", "kda"])
@pytest.mark.parametrize("form", ["reference", "gather"])
def test_onnx_runtime_agrees(kind: str, form: ops.Mode, tmp_path: Path) -> None:
    model = Attend(kind, form).eval()
    program = torch.onnx.export(model, model.inputs(), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    used = {node.op_type for node in program.model.graph}
    assert ("GridSample" in used) == (form == "reference")
    actual = runtime_answer(program, model.inputs(), tmp_path / "model.onnx")
    torch.testing.assert_close(actual, model(*model.inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.native
def test_the_native_operator_decomposes_to_standard_nodes(tmp_path: Path) -> None:
    reason = ops.dispatch.missing("cpu")
    if reason is not None:
        pytest.skip(reason)
    model = Attend("msda", "native").eval()
    exported = torch.export.export(model, model.inputs())

    def plain(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
        levels = list(zip(shapes[::2], shapes[1::2], strict=True))
        return msda_plain(value, levels, locations, weights)

    table = torch.export.default_decompositions() | {torch.ops.detrcli_ops.msda.default: plain}
    program = torch.onnx.export(
        exported.run_decompositions(table), dynamo=True, opset_version=20, verbose=False
    )
    assert program is not None
    actual = runtime_answer(program, model.inputs(), tmp_path / "model.onnx")
    torch.testing.assert_close(actual, model(*model.inputs()), rtol=1e-4, atol=1e-5)
