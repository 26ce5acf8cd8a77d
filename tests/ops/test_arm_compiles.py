"""The CPU kernels are valid C++ for ARM, too, wherever there is a cross compiler; nothing is generated, so it takes a second."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = "aarch64-linux-gnu-g++"
SOURCE = Path(__file__).parents[2] / "detrcli_ops" / "csrc" / "cpu" / "kernels.cpp"


@pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no {COMPILER}: the kernels are not tried for ARM"
)
def test_the_cpu_kernels_compile_for_arm() -> None:
    table = ["-DDETRCLI_OPS_ISA=kernels_native", "-DDETRCLI_OPS_VECTOR_BYTES=16"]
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *table, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
