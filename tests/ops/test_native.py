"""The native operators as torch operators: gradients, tracing, autocast, determinism, refusals."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detrcli import ops
from detrcli.ops import dispatch
from tests.ops.cases import KINDS, SHAPES, Case, make_case

WHEEL = dispatch.missing("cpu")
pytestmark = [
    pytest.mark.native,
    # opcheck itself looks at the gradients of the copies that it makes
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.skipif(WHEEL is not None, reason=str(WHEEL)),
]


def call_of(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator behind a case, and its arguments."""
    t, shapes = case.tensors, [size for shape in case.shapes for size in shape]
    if case.kind == "msda":
        return torch.ops.detrcli_ops.msda, (t["value"], shapes, t["locations"], t["weights"])
    rest = (t["value"], shapes, t["reference"], t["offsets"])
    if case.kind == "msda_fused":
        return torch.ops.detrcli_ops.msda_fused, (*rest, t["logits"], t["mask"])
    return torch.ops.detrcli_ops.kda, (t["query"], t.get("key"), *rest, t["mask"], 0.3)


def leaves(case: Case) -> Case:
    return case.map(lambda t: t.detach().clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 5, 32])
def test_gradcheck(kind: str, depth: int, device: str) -> None:
    case = make_case(kind, batch=1, queries=2, depth=depth, points=2, box=True, masked=True, device=device)
    names = list(case.floats())
    inputs = tuple(t.clone().requires_grad_() for t in case.floats().values())
    torch.autograd.gradcheck(
        lambda *tensors: case("native", **dict(zip(names, tensors, strict=True))),
        inputs,
        fast_mode=depth > 5,
        nondet_tol=1e-12 if device == "cuda" else 0.0,  # atomics add in any order
    )


def test_second_derivatives_are_refused(device: str) -> None:
    case = make_case("msda", device=device)
    value = case.tensors["value"].requires_grad_()
    (grad,) = torch.autograd.grad(case("native").sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(kind: str, masked: bool, device: str) -> None:
    operator, args = call_of(leaves(make_case(kind, masked=masked, device=device)))
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_backward(kind: str, device: str) -> None:
    case = make_case(kind, masked=True, device=device)
    operator, args = call_of(case)
    backward = getattr(torch.ops.detrcli_ops, f"{'kda' if kind.startswith('kda') else kind}_backward")
    needs = (True, True) if kind == "msda" else (True, True, True)
    for wanted in (needs, tuple(not need for need in needs)):
        torch.library.opcheck(backward, (operator(*args), *args, *wanted, False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["native", pytest.param("reference", marks=pytest.mark.slow)])
def test_compiles_without_a_break(kind: str, form: ops.Mode, device: str) -> None:
    case = make_case(kind, masked=True, box=True, device=device)
    names = list(case.floats())

    def attend(*tensors: Tensor) -> Tensor:
        return case(form, **dict(zip(names, tensors, strict=True))) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    plain, traced = (tuple(t.clone().requires_grad_() for t in case.floats().values()) for _ in range(2))
    expected, actual = attend(*plain), compiled(*traced)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    expected.sum().backward()
    actual.sum().backward()
    for name, a, b in zip(names, traced, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


class Attend(torch.nn.Module):
    """A case as a module, for export."""

    def __init__(self, case: Case, form: ops.Mode) -> None:
        super().__init__()
        self.case, self.form, self.names = case, form, list(case.floats())

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.case(self.form, **dict(zip(self.names, tensors, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_as_one_node(kind: str) -> None:
    case = make_case(kind)
    args = tuple(case.floats().values())
    module = Attend(case, "native")
    dynamic = tuple({0: torch.export.Dim("batch", min=1, max=8)} for _ in args)
    program = torch.export.export(module, args, dynamic_shapes=(dynamic,))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert sum("detrcli_ops" in str(target) for target in called) == 1
    other = tuple(make_case(kind, batch=3).floats().values())
    torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["native", "reference"])
def test_autocast_lowers_rows_and_not_geometry(kind: str, form: ops.Mode, device: str) -> None:
    case = make_case(kind, device=device).map(lambda t: t.float())
    with torch.autocast(device, dtype=torch.bfloat16):
        out = case(form)
    rows = {n: t.bfloat16() for n, t in case.floats().items() if n in ("value", "key", "query")}
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, case(form, **rows), rtol=0, atol=0)
    leaf = leaves(case)
    with torch.autocast(device, dtype=torch.bfloat16):
        leaf(form).float().sum().backward()
    for name, tensor in leaf.floats().items():
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["msda_fused", "kda"])
def test_sixteen_bit_geometry_is_read_as_it_is(kind: str, device: str) -> None:
    case = make_case(kind, device=device).map(lambda t: t.bfloat16())
    wide = case.map(lambda t: t.float())
    torch.testing.assert_close(case("native").float(), wide("native"), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [5, 200])
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 4},  # 3 and 5 threads do not share the heads out: backward then takes two passes
        {
            "batch": 1,
            "heads": 1,
            "shapes": [(6, 5), (0, 4), (3, 4), (2, 1)],
        },  # fewer heads than threads: by levels
        {"heads": 3, "shapes": [(6, 5)]},  # queries of few samples are taken together
    ],
    ids=["heads", "levels", "few samples"],
)
def test_any_number_of_threads_gives_the_same_bits(kind: str, queries: int, sizes: dict[str, Any]) -> None:
    case = make_case(kind, queries=queries, depth=32, box=True, masked=True, **sizes).to(torch.float32)
    expected, expected_grads = case.gradients("native")
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            out, grads = case.gradients("native")
            assert torch.equal(out, expected)
            assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 5, 8])
def test_a_query_does_not_feel_its_neighbours(kind: str, dtype: torch.dtype, points: int) -> None:
    """Queries of few samples are located together; one of them is spoiled here, and one has logits far from the others'."""
    case = make_case(kind, queries=9, points=points, shapes=[(6, 5)], box=True, masked=True).to(dtype)
    own = [name for name in case.floats() if name not in ("value", "key")]
    for name in own:
        tensor = case.tensors[name]
        assert tensor is not None
        if name in ("locations", "offsets"):
            tensor[:, 3] = math.nan
        if name in ("logits", "query"):
            tensor[:, 5] -= 200
    together, grads = case.gradients("native", torch.ones(2, 9, 16, dtype=dtype))
    assert together.isnan().any(-1).all(0).nonzero().flatten().tolist() == [3]
    for q in range(9):
        alone = {name: tensor[:, q : q + 1] for name, tensor in case.floats().items() if name in own}
        one = replace(case, tensors=case.tensors | alone)
        out, one_grads = one.gradients("native", torch.ones(2, 1, 16, dtype=dtype))
        assert torch.equal(out.nan_to_num(9), together[:, q : q + 1].nan_to_num(9))
        for name in own:
            assert torch.equal(one_grads[name].nan_to_num(9), grads[name][:, q : q + 1].nan_to_num(9)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [2, 5, 32])
@pytest.mark.parametrize(
    ("points", "shapes"), [(3, SHAPES), (1, SHAPES[:1]), (2, SHAPES[:1]), (4, SHAPES[:1])]
)
def test_every_instruction_set_gives_the_same_numbers(
    kind: str, depth: int, points: int, shapes: tuple[tuple[int, int], ...]
) -> None:
    from detrcli_ops import isa, use_isa

    best = isa()
    if best == "native":
        pytest.skip("this processor has one instruction set only")
    case = make_case(kind, queries=40, depth=depth, points=points, shapes=shapes, box=True, masked=True).to(
        torch.float32
    )
    expected, expected_grads = case.gradients("native")
    try:
        for name in ("sse4", "avx2"):
            if not use_isa(name):
                continue
            out, grads = case.gradients("native")
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            for leaf, grad in grads.items():
                torch.testing.assert_close(grad, expected_grads[leaf], rtol=1e-4, atol=1e-4)
    finally:
        use_isa(best)


def test_rows_beyond_2_to_the_31_numbers_are_found() -> None:
    side, depth = 1 << 13, 40
    try:  # 5 GiB of addresses, of which two pages are touched
        value = torch.empty(1, side * side, 1, depth, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"not enough addresses: {error}")
    value[0, -1, 0] = torch.arange(depth)
    last = torch.full((1, 1, 1, 1, 1, 2), 1 - 0.5 / side)
    out = ops.msda(value, [(side, side)], last, torch.ones(last.shape[:5]), form="native")
    assert torch.equal(out[0, 0], value[0, -1, 0])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_mode_gives_the_same_bits(kind: str, device: str, deterministic: None) -> None:
    case = make_case(kind, queries=500, depth=32, heads=8, masked=True, device=device).to(torch.float32)
    _, first = case.gradients("native")
    for _ in range(20 if device == "cuda" else 1):
        _, again = case.gradients("native")
        assert all(torch.equal(again[name], first[name]) for name in first)
    torch.use_deterministic_algorithms(False)
    _, close = case.gradients("native")
    for name, grad in first.items():
        torch.testing.assert_close(grad, close[name], rtol=1e-4, atol=1e-4)


SPOILED = (
    ("msda", "weights"),
    ("msda_fused", "logits"),
    ("kda", "query"),
    ("kda", "value"),
    ("kda_separate_key", "key"),
)


@pytest.mark.parametrize(("kind", "name"), SPOILED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_deterministic_mode_loses_no_gradient_that_is_not_finite(
    kind: str, name: str, bad: float, device: str, deterministic: None
) -> None:
    case = make_case(kind, device=device).to(torch.float32)
    case.tensors[name][0] = bad
    _, grads = case.gradients("native")
    for rows in ("value", "key"):
        if rows in grads:
            assert not grads[rows][0].isfinite().all()
            assert device == "cpu" or grads[rows].isnan().all()


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("held", [math.nan, math.inf, 1e30])
def test_deterministic_mode_does_not_look_at_padding(
    kind: str, held: float, device: str, deterministic: None
) -> None:
    case = make_case(kind, masked=True, device=device).to(torch.float32)
    padding = case.tensors["mask"][:, :, None, None]
    _, expected = case.gradients("native")
    rows = {n: t.masked_fill(padding, held) for n, t in case.floats().items() if n in ("value", "key")}
    _, grads = replace(case, tensors=case.tensors | rows).gradients("native")
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_side_streams_and_graph_capture(kind: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("streams are CUDA's")
    case = make_case(kind, device=device).to(torch.float32)
    expected = case("native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = case("native")
    stream.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case("native")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def refusals() -> dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]]:
    return {
        "level sums": ("msda", lambda t: {"shapes": [6, 5, 3, 4, 2, 2]}, "tokens"),
        "negative size": ("msda", lambda t: {"shapes": [-6, -5, 3, 4, 2, 1]}, "negative"),
        "odd shapes": ("msda", lambda t: {"shapes": [6, 5, 3]}, "height, width"),
        "overflowing shapes": ("msda", lambda t: {"shapes": [2**40, 2**40, 3, 4, 2, 1]}, "2\\^31"),
        "rank of value": ("msda", lambda t: {"value": t["value"][0]}, r"\(B, S, M, D\)"),
        "rank of locations": ("msda", lambda t: {"locations": t["locations"][0]}, "B, Q, M, L, P, 2"),
        "weights": ("msda", lambda t: {"weights": t["weights"][:, :-1]}, "weights must be"),
        "float64 with float32": ("msda", lambda t: {"weights": t["weights"].float()}, "float64"),
        "integers": ("msda", lambda t: {"value": t["value"].long()}, "float64, float32"),
        "device": ("msda", lambda t: {"weights": t["weights"].to("meta")}, "one device"),
        "reference width": ("msda_fused", lambda t: {"reference": t["reference"][..., :1]}, "reference must"),
        "logits": ("msda_fused", lambda t: {"logits": t["logits"][..., :-1]}, "logits must be"),
        "mask dtype": ("msda_fused", lambda t: {"mask": t["mask"].long()}, "bool"),
        "mask size": ("msda_fused", lambda t: {"mask": t["mask"][:, :-1]}, "mask must be"),
        "query": ("kda_separate_key", lambda t: {"query": t["query"][:, :-1]}, "query must be"),
        "key": ("kda_separate_key", lambda t: {"key": t["key"][:, :-1]}, "key must be"),
        # a copy of these would be asked for first, and be refused for its size
        "endless weights": ("msda", lambda t: {"weights": endless(t["weights"])}, "weights must be"),
        "endless logits": ("msda_fused", lambda t: {"logits": endless(t["logits"])}, "logits must be"),
        "endless query": ("kda", lambda t: {"query": endless(t["query"])}, "query must be"),
    }


def endless(tensor: Tensor) -> Tensor:
    """2^50 times the same numbers, in the memory of one."""
    return tensor[:1].expand(1 << 50, *tensor.shape[1:])


@pytest.mark.parametrize("name", list(refusals()))
def test_the_operators_themselves_refuse_what_cannot_be_meant(name: str, device: str) -> None:
    kind, change, message = refusals()[name]
    case = make_case(kind, masked=True, device=device)
    operator, args = call_of(case)
    named = dict(zip([a.name for a in operator.default._schema.arguments], args, strict=True))
    named |= change(named)
    # straight to the kernel: the fake implementation would stand in for it where a tensor is on "meta"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
    with pytest.raises(RuntimeError, match=message):
        operator.default.redispatch(keys, *named.values())


def test_the_library_links_no_second_openmp() -> None:
    from detrcli_ops._C import FOLDER

    binary = (FOLDER / "libdetrcli_ops.so").read_bytes()
    assert b"libgomp" not in binary
    assert b"PyObject" not in binary
    assert ctypes.CDLL(str(FOLDER / "libdetrcli_ops.so")).detrcli_ops_vector_bytes(0) in (16, 32, 64)
