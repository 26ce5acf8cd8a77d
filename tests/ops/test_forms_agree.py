"""The three forms give the same numbers, values and gradients, whatever the sizes and wherever the samples fall."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrcli import ops
from tests.ops.cases import KINDS, Case, make_case

# grid_sample and floor take either side of a pixel centre; everything else is compared to rounding
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2},
    torch.float16: {"rtol": 5e-3, "atol": 1e-2},
}
EDGES = (0.0, 0.5, 1.0, -0.25, 1.25, 1e30, -1e30)
FAR = (1e30, -1e30, 3e38, -3e38)  # the last two overflow float32 when counted in pixels


def compare(case: Case, form: ops.Mode, dtype: torch.dtype = torch.float64) -> None:
    expected, expected_grads = case.gradients("reference")
    actual, grads = case.gradients(form)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    for name, grad in grads.items():
        scale = max(1.0, expected_grads[name].abs().max().item()) if expected_grads[name].numel() else 1.0
        torch.testing.assert_close(
            grad / scale, expected_grads[name] / scale, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(kind: str, box: bool, masked: bool, device: str) -> None:
    compare(make_case(kind, box=box, masked=masked, device=device), "native")


@pytest.mark.parametrize("kind", KINDS)
def test_gather_form(kind: str) -> None:
    compare(make_case(kind, box=True, masked=True), "gather")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kind: str, queries: int, dtype: torch.dtype, device: str) -> None:
    # 300 queries are many samples per token, 1 is few: the two ways to read and to scatter rows
    case = make_case(kind, queries=queries, depth=32, heads=4, box=True, masked=True, device=device).to(dtype)
    compare(case, "native", dtype)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, object]:
    level = st.tuples(st.integers(0, 7), st.integers(0, 7))
    return {
        "batch": draw(st.integers(0, 3)),
        "queries": draw(st.integers(0, 70)),
        "heads": draw(st.sampled_from([1, 2, 3, 8])),
        "depth": draw(st.sampled_from([0, 1, 3, 8, 16, 30, 32, 64, 71, 128])),
        "points": draw(st.integers(0, 5)),
        "shapes": draw(st.lists(level, max_size=6)),
        "box": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.native
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(kind=st.sampled_from(KINDS), size=sizes(), edge=st.sampled_from([None, *EDGES]))
def test_any_size(kind: str, size: dict, edge: float | None, device: str) -> None:
    case = make_case(kind, **size, device=device)
    if edge is not None:
        where = case.tensors["locations" if kind == "msda" else "offsets"]
        where.view(-1)[::3] = edge
        expected = case("reference")
        torch.testing.assert_close(case("native"), expected, rtol=1e-9, atol=1e-10)
        case.gradients("native")  # at kinks either slope is right: it must only not crash
    else:
        compare(case, "native")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_location_that_is_not_finite_poisons_its_query_and_head_only(
    kind: str, bad: float, form: ops.Mode, place: str
) -> None:
    case = make_case(kind, device=place)
    name = "locations" if kind == "msda" else "offsets"
    where = case.tensors[name].clone()
    where[1, 2, 0, 1, 0, 1] = bad
    clean, out = case(form), case(form, **{name: where})
    heads = out.view(2, 7, 2, 8)
    assert heads[1, 2, 0].isnan().all()
    heads[1, 2, 0] = clean.view(2, 7, 2, 8)[1, 2, 0]
    torch.testing.assert_close(out, clean, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_location_that_is_not_finite_has_the_gradients_of_one_outside(
    kind: str, box: bool, bad: float, form: ops.Mode, place: str
) -> None:
    case = make_case(kind, box=box, device=place)
    name = "locations" if kind == "msda" else "offsets"
    where = case.tensors[name]
    where[0, 3, 1, 2, 1] = 1e6
    _, expected = case.gradients(form)
    where[0, 3, 1, 2, 1] = bad
    _, grads = case.gradients(form)
    assert (grads[name][0, 3, 1, 2, 1] == 0).all()
    for leaf, grad in grads.items():
        torch.testing.assert_close(grad, expected[leaf], rtol=1e-12, atol=1e-12, msg=leaf)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_box_that_is_not_finite_has_the_gradients_of_one_outside(
    kind: str, number: int, bad: float, form: ops.Mode, place: str
) -> None:
    case = make_case(kind, box=True, device=place)
    box = case.tensors["reference"][0, 3, 1]
    kept = box.clone()
    box[:2] = 1e6
    _, expected = case.gradients(form)
    box[:2], box[number] = kept[:2], bad
    _, grads = case.gradients(form)
    assert (grads["reference"][0, 3, 1] == 0).all()
    assert (grads["offsets"][0, 3, :, 1] == 0).all()
    for leaf, grad in grads.items():
        torch.testing.assert_close(grad, expected[leaf], rtol=1e-12, atol=1e-12, msg=leaf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", FAR)
def test_a_finite_location_samples_zero_however_far(
    kind: str, far: float, form: ops.Mode, place: str
) -> None:
    case = make_case(kind, box=True, device=place).to(torch.float32)
    for name in ["locations"] if kind == "msda" else ["offsets", "reference"]:
        where = case.tensors[name].clone()
        where[..., :2] = far
        out, grads = replace(case, tensors=case.tensors | {name: where}).gradients(form)
        assert (out == 0).all()
        assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_rows_stays_where_it_is_sampled(kind: str, form: ops.Mode, place: str) -> None:
    # token 0 is the upper left pixel of the first level: samples beyond the border must not touch it
    case = make_case(kind, shapes=[(4, 4)], points=1, queries=3, device=place)
    far = {"locations": -3.0, "offsets": -50.0}
    name = "locations" if kind == "msda" else "offsets"
    value = case.tensors["value"].clone()
    value[:, 0] = math.nan
    changed: dict[str, Tensor | None] = {"value": value, name: torch.full_like(case.tensors[name], far[name])}
    if kind == "kda_separate_key":
        changed["key"] = value
    assert (case(form, **changed) == 0).all()


@pytest.mark.parametrize("kind", ["msda_fused", "kda", "kda_separate_key"])
def test_padding_counts_as_zero_whatever_it_holds(kind: str, form: ops.Mode, place: str) -> None:
    case = make_case(kind, masked=True, device=place)
    mask = case.tensors["mask"]
    rows = {n: case.tensors[n] for n in ("value", "key") if n in case.tensors}
    zeroed = {n: t.masked_fill(mask[:, :, None, None], 0.0) for n, t in rows.items()}
    dirty = {n: t.masked_fill(mask[:, :, None, None], math.nan) for n, t in rows.items()}
    torch.testing.assert_close(case(form, **dirty), case(form, **zeroed, mask=None), rtol=1e-12, atol=1e-12)


def test_kda_keeps_the_share_of_samples_outside(form: ops.Mode, place: str) -> None:
    # with every key far along the query, an inside sample would take all but a hair of the softmax
    case = make_case("kda", shapes=[(3, 3)], points=2, heads=1, depth=4, queries=1, batch=1, device=place)
    offsets = torch.full_like(case.tensors["offsets"], 100.0)
    out = case(form, offsets=offsets)
    assert (out == 0).all()
    value = torch.ones_like(case.tensors["value"])
    reference = torch.full_like(case.tensors["reference"], 0.5)
    offsets[..., 0, :] = 0.0
    query = torch.zeros_like(case.tensors["query"])
    half = case(form, value=value, reference=reference, offsets=offsets, query=query)
    torch.testing.assert_close(half, torch.full_like(half, 0.5))


def test_a_whole_level_of_wide_rows_and_many_points(device: str) -> None:
    compare(make_case("msda", depth=256, points=9, heads=1, queries=5, device=device), "native")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_a_subset_of_the_inputs(kind: str, device: str) -> None:
    case = make_case(kind, box=True, device=device)
    grad = torch.randn_like(case("reference"))
    for name in case.floats():
        leaves = {n: t.detach().clone().requires_grad_(n == name) for n, t in case.floats().items()}
        case("native", **leaves).backward(grad)
        _, expected = case.gradients("reference", grad)
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(kind: str, device: str) -> None:
    case = make_case(kind, depth=16, masked=True, device=device).to(torch.float32)
    expected, expected_grads = case.gradients("native")

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def misaligned(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for change in (strided, misaligned):
        out, grads = case.map(change).gradients("native")
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-5)


def test_expanded_inputs_and_gradients(device: str) -> None:
    case = make_case("msda", device=device)
    one = {n: t[:1].expand(2, *t.shape[1:]) for n, t in case.floats().items()}
    torch.testing.assert_close(case("native", **one), case("reference", **one), rtol=1e-9, atol=1e-10)
    ones = torch.ones((), dtype=torch.float64, device=device).expand(case("native").shape)
    _, grads = case.gradients("native", ones)
    _, expected = case.gradients("reference", ones.contiguous())
    torch.testing.assert_close(grads["value"], expected["value"], rtol=1e-9, atol=1e-10)
