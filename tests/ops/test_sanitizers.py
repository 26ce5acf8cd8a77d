"""The CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer, through the suite's fuzz and edge cases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detrcli.ops import dispatch

REPOSITORY = Path(__file__).parents[2]
SANITIZERS = "address,undefined"


def runtime(name: str) -> str:
    """The sanitizer's shared library, which must be loaded before Python itself."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def build(folder: Path) -> Path:
    """The library with sanitizers, optimised little so that it builds soon."""
    configure = [
        "cmake",
        f"-S{REPOSITORY / 'detrcli_ops'}",
        f"-B{folder}",
        "-DDETRCLI_OPS_CUDA=OFF",
        f"-DDETRCLI_OPS_SANITIZE={SANITIZERS}",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["cmake", "--build", str(folder), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "libdetrcli_ops.so"


@pytest.mark.sanitizers
@pytest.mark.native
@pytest.mark.skipif(dispatch.missing("cpu") is not None, reason=str(dispatch.missing("cpu")))
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="no cmake or no g++")
def test_the_suite_runs_clean_under_sanitizers(tmp_path: Path) -> None:
    import detrcli_ops

    # a copy of the installed package, with the sanitized library, ahead of the installed one
    package = tmp_path / "site" / "detrcli_ops"
    shutil.copytree(Path(detrcli_ops.__file__).parent, package)
    shutil.copy(build(tmp_path / "build"), package / "libdetrcli_ops.so")
    environment = os.environ | {
        "PYTHONPATH": str(package.parent),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    suite = [str(Path(__file__).with_name(name)) for name in ("test_forms_agree.py", "test_goldens.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native or cpu"]
    done = subprocess.run([*command, *suite], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert "ERROR: AddressSanitizer" not in done.stderr + done.stdout, done.stderr[-3000:]
    assert "runtime error:" not in done.stderr + done.stdout, done.stderr[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]
