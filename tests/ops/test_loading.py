"""A wheel of which a part cannot be used: the rest is, and the reason is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detrcli.ops import dispatch

CSRC = Path(__file__).parents[2] / "detrcli_ops" / "csrc"
TORCH = Path(torch.__file__).parent
WHEEL = dispatch.missing("cpu")
pytestmark = [pytest.mark.native, pytest.mark.skipif(WHEEL is not None, reason=str(WHEEL))]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package, its CPU library only."""
    import detrcli_ops

    copy = tmp_path / "site" / "detrcli_ops"
    shutil.copytree(
        Path(detrcli_ops.__file__).parent, copy, ignore=shutil.ignore_patterns("*_cuda.so", "__pycache__")
    )
    return copy


def backends(package: Path) -> list[str]:
    """What answers on the CPU and on CUDA where this package is found, and why."""
    code = "from detrcli import ops\nfor kind in ('cpu', 'cuda'): print(*ops.backend(kind))"
    paths = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=CSRC.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA: no CUDA library is loaded")
def test_a_cuda_library_that_does_not_load_leaves_the_cpu_its_kernels(package: Path) -> None:
    (package / "libdetrcli_ops_cuda.so").write_text("no library")
    cpu, cuda = backends(package)
    assert cpu.startswith("native detrcli-ops")
    assert cuda.startswith("reference detrcli-ops")
    assert "cannot load its CUDA library: " in cuda
    assert "libdetrcli_ops_cuda.so" in cuda


@pytest.mark.slow
def test_a_wheel_built_without_cuda_says_so(package: Path) -> None:
    assert backends(package)[1].endswith("was built without CUDA")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: no library can be built for another processor"
)
def test_a_processor_that_the_wheel_is_not_built_for_gets_the_reference(package: Path) -> None:
    table = package.parent / "wider.cpp"
    table.write_text(  # wider than any register: it runs nowhere
        f'#include "{CSRC}/cpu/problem.h"\n'
        "namespace detrcli_ops {\n"
        "extern const Kernels kernels_wider;\n"
        "const Kernels kernels_wider = {1 << 30};\n"
        "}\n"
    )
    floor = (
        (CSRC.parent / "CMakeLists.txt").read_text().partition("TORCH_TARGET_VERSION=")[2].partition(")")[0]
    )
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wno-missing-field-initializers",
    ]
    command += [f"-DTORCH_TARGET_VERSION={floor}", "-DDETRCLI_OPS_ISAS= ISA(wider)"]
    command += ["-isystem", f"{TORCH}/include", "-isystem", f"{TORCH}/include/torch/csrc/api/include"]
    command += [f"{CSRC}/library.cpp", f"{CSRC}/cpu/operators.cpp", str(table)]
    command += [f"-L{TORCH}/lib", "-ltorch_cpu", "-o", str(package / "libdetrcli_ops.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in backends(package):
        assert line.startswith("reference detrcli-ops")
        assert line.endswith(
            "does not load: this processor runs none of the instruction sets that it was built for"
        )
