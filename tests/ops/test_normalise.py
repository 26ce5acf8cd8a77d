"""Pictures made ready: the wheel against the formula, whatever the sizes and wherever in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrcli import ops
from tests.ops.conftest import native

FORMS = [pytest.param("reference"), pytest.param("native", marks=native("cpu"))]
NATIVE = [pytest.param("native", marks=native("cpu"))]
OUTSIDE = -7.0

side = st.integers(0, 70)


def numbers(height: int, width: int, *, gap: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with some bytes between one and the next, factors, summands."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (height, width + gap), dtype=torch.uint8, generator=generator)[:, :width]
    scale, shift = torch.randn(2, width, generator=generator)
    return rows, scale, shift


def frame(height: int, width: int, *, skipped: int = 0, gap: int = 0) -> tuple[Tensor, Tensor]:
    """A place for an answer, and the memory around it."""
    memory = torch.full((skipped + height * (width + gap),), OUTSIDE)
    return memory[skipped:].view(height, width + gap)[:, :width], memory


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(height=side, width=side, below=side, right=side, skipped=st.integers(0, 17), gap=st.integers(0, 5))
def test_the_formula_zeros_around_it_and_nothing_outside(
    form: ops.Mode, height: int, width: int, below: int, right: int, skipped: int, gap: int
) -> None:
    rows, scale, shift = numbers(height, width, gap=gap)
    out, memory = frame(height + below, width + right, skipped=skipped, gap=gap)
    ops.normalise(rows, scale, shift, out, form=form)
    expected = torch.zeros(out.shape)
    expected[:height, :width] = rows * scale + shift
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    out.fill_(OUTSIDE)
    assert (memory == OUTSIDE).all()


@pytest.mark.parametrize("form", NATIVE)
def test_the_bits_depend_neither_on_the_place_nor_on_threads(form: ops.Mode) -> None:
    rows, scale, shift = numbers(200, 301)
    expected, _ = frame(210, 320)
    ops.normalise(rows, scale, shift, expected, form=form)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for skipped in range(17):
            out, _ = frame(210, 320, skipped=skipped)
            ops.normalise(rows, scale, shift, out, form=form)
            assert torch.equal(out, expected)
    torch.set_num_threads(1)


@pytest.mark.native
@pytest.mark.parametrize("form", NATIVE)
def test_every_instruction_set_gives_the_same_numbers(form: ops.Mode) -> None:
    from detrcli_ops import isa, use_isa

    best = isa()
    rows, scale, shift = numbers(30, 101)
    expected, _ = frame(33, 120)
    ops.normalise(rows, scale, shift, expected, form="reference")
    try:
        for name in ("avx512", "avx2", "sse4") if best != "native" else ():
            if use_isa(name):
                out, _ = frame(33, 120, skipped=3)
                ops.normalise(rows, scale, shift, out, form=form)
                torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-4)
    finally:
        use_isa(best)


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    rows, scale, shift = numbers(4, 6)
    out, _ = frame(5, 8)
    fit = {"rows": rows, "scale": scale, "shift": shift, "out": out}
    return {
        "floats": (fit | {"rows": rows.float()}, "rows must be uint8"),
        "rank": (fit | {"rows": rows[None]}, r"rows must be uint8 \(H, N\)"),
        "columns": (fit | {"rows": rows.t().contiguous().t()}, "without gaps"),
        "float64": (fit | {"out": out.double()}, "out must be float32"),
        "factors": (fit | {"scale": scale[:3]}, "scale must be"),
        "summands": (fit | {"shift": shift[:3]}, "shift must be"),
        "spread factors": (fit | {"scale": scale.repeat_interleave(2)[::2]}, "without gaps"),
        "too low": (fit | {"out": out[:3]}, "at least"),
        "too narrow": (fit | {"out": out[:, :5]}, "at least"),
        "device": (fit | {"scale": scale.to("meta")}, "on the CPU"),
    }


@pytest.mark.parametrize("form", NATIVE)
@pytest.mark.parametrize("name", list(refusals()))
def test_the_operator_refuses_what_does_not_fit(name: str, form: ops.Mode) -> None:
    arguments, message = refusals()[name]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.detrcli_ops.normalise.default.redispatch(keys, *arguments.values())


@pytest.mark.parametrize("form", NATIVE)
def test_opcheck(form: ops.Mode) -> None:
    out, _ = frame(5, 8)
    torch.library.opcheck(torch.ops.detrcli_ops.normalise, (*numbers(4, 6), out))
