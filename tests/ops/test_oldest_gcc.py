"""The CPU kernels compile with the oldest GCC that the build accepts, wherever there is one; nothing is generated: seconds."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "detrcli_ops"
CMAKE = (PACKAGE / "CMakeLists.txt").read_text()
COMPILER = f"g++-{CMAKE.partition('OLDEST_GCC ')[2].partition(')')[0]}"


@pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no {COMPILER}: the kernels are not tried with it"
)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86")
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "SSE4"])
def test_the_cpu_kernels_compile(isa: str) -> None:
    found = re.search(rf"set\({isa}_FLAGS (\d+) (.+)\)", CMAKE)
    assert found is not None
    table = ["-DDETRCLI_OPS_ISA=kernels_oldest", f"-DDETRCLI_OPS_VECTOR_BYTES={found[1]}"]
    command = [
        COMPILER,
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        *found[2].split(),
        *table,
    ]
    done = subprocess.run(
        [*command, str(PACKAGE / "csrc" / "cpu" / "kernels.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
