"""Every law of the operators is tested in each form that this machine can run."""

import pytest
import torch

from detrcli import ops
from detrcli.ops import dispatch

NO_WHEEL = dispatch.missing("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        "reference",
        "gather",
        pytest.param(
            "native",
            marks=[pytest.mark.native, pytest.mark.skipif(NO_WHEEL is not None, reason=str(NO_WHEEL))],
        ),
    ]
)
def form(request: pytest.FixtureRequest) -> ops.Mode:
    return request.param
