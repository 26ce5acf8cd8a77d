"""The CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer: odd arguments, and the suite itself."""

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
RUNTIMES = ("libasan.so", "libubsan.so")
# beside Python first: `make` installs cmake into the environment without activating it
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def runtime(name: str) -> Path:
    """The sanitizer's shared library, which must be loaded before Python itself; relative where there is none."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def missing() -> str | None:
    """Why nothing can be built here; None when it can."""
    if (reason := dispatch.missing("cpu")) is not None:
        return reason
    if CMAKE is None or shutil.which("g++") is None:
        return "no cmake or no g++"
    return next((f"g++ has no {name}" for name in RUNTIMES if not runtime(name).is_absolute()), None)


MISSING = missing()
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


def build(folder: Path, flags: str, isas: list[str]) -> Path:
    configure = [
        str(CMAKE),
        f"-S{REPOSITORY / 'detrcli_ops'}",
        f"-B{folder}",
        "-DDETRCLI_OPS_CUDA=OFF",
        f"-DDETRCLI_OPS_SANITIZE={SANITIZERS}",
        f"-DDETRCLI_OPS_ISAS={';'.join(isas)}",
        "-DCMAKE_BUILD_TYPE=Debug",
        f"-DCMAKE_CXX_FLAGS_DEBUG={flags}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, [str(CMAKE), "--build", str(folder), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "libdetrcli_ops.so"


def sanitized(folder: Path, flags: str, isas: list[str]) -> Path:
    """A copy of the installed package with a sanitized library, to be found ahead of the installed one."""
    import detrcli_ops

    package = folder / "site" / "detrcli_ops"
    shutil.copytree(Path(detrcli_ops.__file__).parent, package)
    shutil.copy(build(folder / "build", flags, isas), package / "libdetrcli_ops.so")
    return package


def run(package: Path, *module: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]),
        "LD_PRELOAD": " ".join(str(runtime(name)) for name in RUNTIMES),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert "ERROR: AddressSanitizer" not in done.stderr + done.stdout, done.stderr[-3000:]
    assert "runtime error:" not in done.stderr + done.stdout, done.stderr[-3000:]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_odd_arguments_touch_no_memory_but_their_own(tmp_path: Path) -> None:
    from detrcli_ops import isa

    # unoptimised: a unit builds in a quarter of the time; the baseline, and what this processor really uses
    isas = [isa()] if isa() in ("native", "sse4") else [isa(), "sse4"]
    package = sanitized(tmp_path, "-O0 -g1", isas)
    out = run(package, "tests.ops.fuzz_arguments", "100")
    for name in isas:
        assert f"100 calls of {name} in {package}" in out


@pytest.mark.sanitizers
def test_the_suite_runs_clean_under_sanitizers(tmp_path: Path) -> None:
    package = sanitized(tmp_path, "-O1 -g1", ["avx512", "avx2", "sse4"])
    suite = [str(Path(__file__).with_name(name)) for name in ("test_forms_agree.py", "test_goldens.py")]
    run(package, "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native or cpu", *suite)
