"""Every law of the operators is tested in each form, and on each device, that this machine can run."""

import pytest
import torch

from detrcli import ops
from detrcli.ops import dispatch


def native(name: str, device: str) -> object:
    """A parameter that needs the wheel's kernels for a device; skipped with the reason where they are missing."""
    reason = dispatch.missing(device)
    if reason is None and device == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device here"
    marks = [pytest.mark.native, pytest.mark.skipif(reason is not None, reason=str(reason))]
    return pytest.param(name, marks=[*marks, pytest.mark.gpu] if device == "cuda" else marks)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "gather", native("native", "cpu")])
def form(request: pytest.FixtureRequest) -> ops.Mode:
    return request.param


@pytest.fixture(params=[native("cpu", "cpu"), native("cuda", "cuda")])
def device(request: pytest.FixtureRequest) -> str:
    """Where native kernels are compared with the reference."""
    return request.param
