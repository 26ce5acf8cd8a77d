"""Which form answers, why, and what is refused before it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detrcli import ops
from detrcli.errors import DetrError, UsageError
from detrcli.ops import dispatch
from tests.ops.cases import KINDS, make_case

ABSENT = dispatch.Wheel(None, None, "detrcli-ops is not installed (pip install detrcli-ops)")
CPU_ONLY = dispatch.Wheel("1.2.3", None, "detrcli-ops 1.2.3")
WITH_CUDA = dispatch.Wheel("1.2.3", "1.2.3", "detrcli-ops 1.2.3")


@pytest.fixture(autouse=True)
def automatic() -> Any:
    with ops.use("auto"):
        yield


def test_without_the_wheel_the_reference_answers_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "wheel", ABSENT)
    assert ops.backend("cpu") == ("reference", ABSENT.reason)
    with ops.use("native"), pytest.raises(DetrError, match="not installed") as error:
        ops.backend("cpu")
    assert error.value.hint is not None


def test_a_wheel_without_cuda_serves_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "wheel", CPU_ONLY)
    assert ops.backend("cpu") == ("native", "detrcli-ops 1.2.3")
    assert ops.backend("cuda") == ("reference", "detrcli-ops 1.2.3 was built without CUDA")
    assert ops.backend("mps") == ("reference", "detrcli-ops 1.2.3 has no kernels for mps")


def gpu(major: int, minor: int) -> Callable[[torch.device], SimpleNamespace]:
    return lambda device: SimpleNamespace(name=f"GPU {device.index}", major=major, minor=minor)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1)])
def test_every_gpu_that_the_wheel_has_code_for_is_served(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "wheel", WITH_CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu(*capability))
    assert ops.backend("cuda:1") == ("native", "detrcli-ops 1.2.3")


def test_a_gpu_that_the_wheel_has_no_code_for_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "wheel", WITH_CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu(7, 5))
    reason = "detrcli-ops 1.2.3 needs compute capability 8.0; GPU 1 has 7.5"
    assert ops.backend("cuda:1") == ("reference", reason)
    with pytest.raises(DetrError, match=reason):
        ops.backend("cuda:1", "native")


def test_the_oldest_gpu_has_code_to_translate_for_all_later_ones() -> None:
    cmake = (Path(__file__).parents[2] / "detrcli_ops/CMakeLists.txt").read_text()
    architectures = cmake.partition("DETRCLI_OPS_CUDA_ARCHITECTURES")[2].split('"')[1]
    assert architectures.split(";")[0] == f"{dispatch.CAPABILITY}0"  # neither -real nor -virtual: both


SIZES: dict[str, dict[str, Any]] = {
    "65535 pictures": {"batch": 65536, "heads": 1},
    "65535 heads": {"batch": 1, "heads": 65536},
    "256 channels": {"depth": 257},
    "32 levels": {"shapes": [(1, 1)] * 33},
}


@pytest.mark.parametrize("most", list(SIZES))
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_beyond_those_of_the_cuda_kernels_get_the_reference(
    kind: str, most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "wheel", WITH_CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu(9, 0))
    monkeypatch.setattr(ops, "native", lambda *call: pytest.fail("the kernels were asked"))
    small: dict[str, Any] = {"queries": 1, "points": 1, "depth": 1, "shapes": [(1, 1)]}
    case = make_case(kind, **small | SIZES[most])
    with FakeTensorMode():  # knows devices that are not there
        case = case.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        assert case().device.type == "cuda"
        with pytest.raises(DetrError, match=f"at most {most} on CUDA, not {int(most.split()[0]) + 1}"):
            case("native")
    assert ops.backend("cuda", sizes=dispatch.MOST_ON_CUDA).name == "native"


def test_a_mode_can_be_asked_for_by_block_and_by_call() -> None:
    with ops.use("gather"):
        assert ops.backend("cpu").name == "gather"
        assert ops.backend("cpu", "reference").name == "reference"
    assert ops.backend("cpu", "gather") == ("gather", "asked for")


def test_an_unknown_mode_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="DETR_OPS"):
        ops.backend("cpu", "natve")  # type: ignore[arg-type]


def test_the_wheel_is_asked_of_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert dispatch.find_wheel() == ABSENT


def test_a_wheel_that_does_not_load_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("undefined symbol:\n aoti_torch_x")

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(importlib, "import_module", broken)
    assert dispatch.find_wheel().reason == "detrcli-ops 1.2.3 does not load: undefined symbol: aoti_torch_x"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reference", "gather", "auto", ""])
def test_the_environment_sets_the_mode(mode: str) -> None:
    code = "from detrcli import ops; print(ops.backend('cpu').name)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"DETR_OPS": mode}, capture_output=True, text=True, check=True
    )
    expected = (
        ("native" if dispatch.missing("cpu") is None else "reference") if mode in ("auto", "") else mode
    )
    assert run.stdout.strip() == expected


REFUSALS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "rank of value": ("msda", lambda t: {"value": t["value"][0]}, ValueError, "value must be"),
    "locations": ("msda", lambda t: {"locations": t["locations"][:, :, :1]}, ValueError, "locations must be"),
    "weights": ("msda", lambda t: {"weights": t["weights"][:, 1:]}, ValueError, "weights must be"),
    "tokens": ("msda", lambda t: {"value": t["value"][:, 1:]}, ValueError, "tokens but the levels"),
    "float64": ("msda", lambda t: {"value": t["value"].float()}, TypeError, "float64 needs all float64"),
    "integers": ("msda", lambda t: {"value": t["value"].long()}, TypeError, "got torch.int64"),
    "device": ("msda", lambda t: {"weights": t["weights"].to("meta")}, ValueError, "is on meta"),
    "reference": (
        "msda_fused",
        lambda t: {"reference": t["reference"][..., :1]},
        ValueError,
        "reference must",
    ),
    "logits": ("msda_fused", lambda t: {"logits": t["logits"][..., 1:]}, ValueError, "logits must be"),
    "mask dtype": ("msda_fused", lambda t: {"mask": t["mask"].int()}, TypeError, "mask.bool()"),
    "mask size": ("msda_fused", lambda t: {"mask": t["mask"][:, 1:]}, ValueError, "mask must be"),
    "query": ("kda_separate_key", lambda t: {"query": t["query"][:, 1:]}, ValueError, "query must be"),
    "key": ("kda_separate_key", lambda t: {"key": t["key"][:, 1:]}, ValueError, "key must be"),
    "mixed rows": (
        "kda_separate_key",
        lambda t: {n: v.float() if n != "key" else v.bfloat16() for n, v in t.items() if n != "mask"},
        TypeError,
        "key is torch.bfloat16",
    ),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_what_cannot_be_meant_is_refused_in_one_line(name: str) -> None:
    kind, change, error, message = REFUSALS[name]
    case = make_case(kind, masked=True)
    with pytest.raises(error, match=message) as raised:
        case(**change(case.tensors))
    assert "\n" not in str(raised.value)


def test_negative_sizes_are_refused() -> None:
    value = torch.zeros(1, 6, 1, 1)
    with pytest.raises(ValueError, match="negative"):
        ops.msda(value, [(-2, -3)], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
