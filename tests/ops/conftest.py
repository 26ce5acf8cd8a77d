"""Every law of the operators is tested in each form, and on each device, that this machine can run."""

import pytest
import torch

from detrcli import ops
from detrcli.ops import dispatch

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def native(device: str) -> list[pytest.MarkDecorator]:
    """The marks of what needs the wheel's kernels for a device; skipped with the reason where they are missing."""
    there = device == "cpu" or torch.cuda.is_available()
    reason = dispatch.missing(device) if there else None  # GPU says it
    marks = [pytest.mark.native, pytest.mark.skipif(reason is not None, reason=str(reason))]
    return marks if device == "cpu" else [*GPU, *marks]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("gather", "cpu"), id="gather"),
        pytest.param(("native", "cpu"), id="native", marks=native("cpu")),
        pytest.param(("reference", "cuda"), id="reference-cuda", marks=GPU),
        pytest.param(("gather", "cuda"), id="gather-cuda", marks=GPU),
        pytest.param(("native", "cuda"), id="native-cuda", marks=native("cuda")),
    ]
)
def answering(request: pytest.FixtureRequest) -> tuple[ops.Mode, str]:
    return request.param


@pytest.fixture
def form(answering: tuple[ops.Mode, str]) -> ops.Mode:
    return answering[0]


@pytest.fixture
def place(answering: tuple[ops.Mode, str]) -> str:
    """The device on which the form answers."""
    return answering[1]


@pytest.fixture(params=[pytest.param("cpu", marks=native("cpu")), pytest.param("cuda", marks=native("cuda"))])
def device(request: pytest.FixtureRequest) -> str:
    """Where native kernels are compared with the reference."""
    return request.param
