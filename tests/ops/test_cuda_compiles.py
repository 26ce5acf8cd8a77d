"""The CUDA operators compile wherever nvcc is, with or without a GPU. Unoptimised, so that it takes half a minute an architecture."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
HEADERS = Path(torch.__file__).parent / "include"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA operators are not compiled")
@pytest.mark.parametrize(  # with and without atomics of whole vectors
    "architecture", ["sm_90", pytest.param("sm_80", marks=pytest.mark.long)]
)
def test_the_cuda_operators_compile(architecture: str, tmp_path: Path) -> None:
    cmake = (REPOSITORY / "detrcli_ops" / "CMakeLists.txt").read_text()
    floor = cmake.partition("TORCH_TARGET_VERSION=")[2].partition(")")[0]
    command = ["nvcc", "-std=c++17", "-Xcicc=-O0", "-Xptxas=-O0", "-cubin", f"-arch={architecture}"]
    command += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={floor}"]
    command += ["-isystem", str(HEADERS), "-isystem", str(HEADERS / "torch/csrc/api/include")]
    source = REPOSITORY / "detrcli_ops/csrc/cuda/operators.cu"
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "kernels.cubin").stat().st_size > 100_000
