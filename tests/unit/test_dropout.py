"""Dropout drops as often as asked, scales what is left, and gives gradients to what was kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from detrcli.nn.dropout import Dropout

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(1000, 1000, dtype=dtype)).double()
    kept = out != 0
    deviation = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 6 * deviation + 2**-16
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=rounding, atol=0)
    for axis in (0, 1):  # no row and no column is special
        assert abs(kept.double().mean(axis) - (1 - p)).max() < 7 * (p * (1 - p) / 1000) ** 0.5
    neighbours = (kept[:, 1:] == kept[:, :-1]).double().mean()
    assert abs(neighbours - (p * p + (1 - p) ** 2)) < 0.005


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_goes_where_the_value_went(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, 3, dtype=dtype).transpose(0, 2).requires_grad_()  # not contiguous
    out = Dropout(0.4)(x)
    gradient = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, gradient)
    factor = 1 / (1 - 0.4)
    kept = out != 0
    near = {"rtol": 0.02, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 0.0}
    torch.testing.assert_close(out[kept], (x * factor)[kept], **near)
    torch.testing.assert_close(got[kept], (gradient * factor)[kept], **near)
    assert not got[~kept].any()


@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.sampled_from([0.0, 1e-9, 0.3, 1.0]))
def test_any_shape_and_any_share(shape: list[int], p: float) -> None:
    x = torch.randn(shape)
    out = Dropout(p)(x)
    assert out.shape == x.shape
    if p in (0.0, 1e-9):
        assert torch.equal(out, x)
    if p == 1.0:
        assert not out.any()
    assert torch.equal(Dropout(p).eval()(x), x)


def test_the_seed_decides_and_recomputing_draws_the_same() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    layer = nn.Sequential(nn.Linear(64, 64), Dropout(0.5), nn.Linear(64, 1))
    results = []
    for again in (False, False, True):
        torch.manual_seed(3)
        out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        results.append(torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
