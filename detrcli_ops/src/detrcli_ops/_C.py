"""Loads the compiled libraries; the CUDA one only where this torch has CUDA and the wheel was built with it."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Final, Literal

import torch

Isa = Literal["sse4", "avx2", "avx512"]
VECTOR_BYTES: Final[dict[str, int]] = {"sse4": 16, "avx2": 32, "avx512": 64}
FOLDER: Final = Path(__file__).parent

torch.ops.load_library(FOLDER / "libdetrcli_ops.so")
_cpu = ctypes.CDLL(str(FOLDER / "libdetrcli_ops.so"))
if _cpu.detrcli_ops_vector_bytes(0) == 0:
    raise ImportError("this processor runs none of the instruction sets that it was built for")


def load_cuda() -> str | None:
    """Load the CUDA library; why it cannot be used, None where it can. The CPU's kernels do without it."""
    library = FOLDER / "libdetrcli_ops_cuda.so"
    if not library.exists():
        return "was built without CUDA"
    if torch.version.cuda is None:
        return "was built with CUDA, this torch without"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"cannot load its CUDA library: {' '.join(str(error).split())}"
    return None


WITHOUT_CUDA: Final = load_cuda()


def isa() -> str:
    """The instruction set in use; on other processors than x86, "native"."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "native"
    width = _cpu.detrcli_ops_vector_bytes(0)
    return next(name for name, size in VECTOR_BYTES.items() if size == width)


def use_isa(name: Isa) -> bool:
    """Use at most this instruction set, for comparisons; whether it is the one in use now."""
    return bool(_cpu.detrcli_ops_vector_bytes(VECTOR_BYTES[name]) == VECTOR_BYTES[name])
