"""The CUDA operators compile wherever nvcc is, with or without a GPU; unoptimised, for that takes half a minute an architecture.
Which architectures are compiled for is asked of CMake, without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
HEADERS = Path(torch.__file__).parent / "include"
UNOPTIMISED = ["-Xcicc=-O0", "-Xptxas=-O0"]
# beside Python first: `make` installs cmake into the environment without activating it
PATHS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA operators are not compiled")
@pytest.mark.parametrize(  # with and without atomics of whole vectors
    "architecture", ["sm_90", pytest.param("sm_80", marks=pytest.mark.long)]
)
def test_the_cuda_operators_compile(architecture: str, tmp_path: Path) -> None:
    cmake = (REPOSITORY / "detrcli_ops" / "CMakeLists.txt").read_text()
    floor = cmake.partition("TORCH_TARGET_VERSION=")[2].partition(")")[0]
    command = ["nvcc", "-std=c++17", *UNOPTIMISED, "-cubin", f"-arch={architecture}"]
    command += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={floor}"]
    command += ["-isystem", str(HEADERS), "-isystem", str(HEADERS / "torch/csrc/api/include")]
    source = REPOSITORY / "detrcli_ops/csrc/cuda/operators.cu"
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "kernels.cubin").stat().st_size > 100_000


@pytest.mark.skipif(
    shutil.which("cmake", path=PATHS) is None, reason="no cmake, which make install brings, to be asked"
)
@pytest.mark.parametrize(
    ("nvcc", "asked", "known"),
    [
        ("13.0.88", "80;90-real;100-real;120", "80;90-real;100-real;120"),
        ("12.8.61", "80;90-real;100-real;120", "80;90-real;100-real;120"),
        ("12.6.20", "80;90-real;100-real;120", "80;90"),
        ("12.6.20", "100-real", ""),
        ("11.8.89", "80;90-real;100-real;120", ""),
    ],
)
def test_what_a_compiler_does_not_know_is_left_out(nvcc: str, asked: str, known: str, tmp_path: Path) -> None:
    script = tmp_path / "ask.cmake"
    script.write_text(
        f'include("{REPOSITORY}/detrcli_ops/cmake/architectures.cmake")\n'
        f'known_architectures(found "{asked}" {nvcc})\n'
        'message("found: ${found}")\n'
    )
    cmake = str(shutil.which("cmake", path=PATHS))
    done = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == f"found: {known}".strip()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA library is not built")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA: the library cannot be linked")
def test_the_wheel_is_built_with_cuda_and_its_library_loads(tmp_path: Path) -> None:
    defined = {
        "DETRCLI_OPS_CUDA": "ON",
        "DETRCLI_OPS_CUDA_ARCHITECTURES": "90-real",
        "DETRCLI_OPS_ISAS": "sse4",
        "CMAKE_CUDA_FLAGS": " ".join(UNOPTIMISED),
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
    ]
    for name, value in defined.items():
        command += ["-C", f"cmake.define.{name}={value}"]
    source = shutil.copytree(REPOSITORY / "detrcli_ops", tmp_path / "source")
    done = subprocess.run(
        [*command, str(source)], env=os.environ | {"PATH": PATHS}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import detrcli_ops, torch\n"
        "asked = torch._C._dispatch_has_kernel_for_dispatch_key('detrcli_ops::kda_backward', 'CUDA')\n"
        "print(detrcli_ops.__file__, detrcli_ops._C.WITHOUT_CUDA, asked)"
    )
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert said.stdout.split() == [str(tmp_path / "site/detrcli_ops/__init__.py"), "None", "True"], (
        said.stderr
    )
