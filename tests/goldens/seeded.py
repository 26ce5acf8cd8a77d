"""Deterministic weights and images, so that a golden file need not carry them.

A golden holds a manifest of tensor names and shapes, and the outputs that a
reference implementation gave for `state_dict(manifest)` and `image(...)`.
Both sides draw the same numbers: each tensor is seeded by its own name.
"""

import hashlib
import math

import numpy as np


def tensor(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """The value of one parameter or buffer, from its name alone (float32)."""
    seed = int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "little")
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    if leaf == "weight" and len(shape) == 1:  # a normalisation scale
        return 1.0 + 0.1 * x
    if leaf.endswith("bias") or len(shape) <= 1:
        return 0.1 * x
    fan_in = math.prod(shape[1:])
    return (x / math.sqrt(fan_in)).astype(np.float32)


def state_dict(manifest: dict[str, list[int]], salt: str = "") -> dict[str, np.ndarray]:
    """All tensors of a manifest {name: shape}."""
    return {name: tensor(name, tuple(shape), salt) for name, shape in manifest.items()}


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth, textured RGB image, uint8, HWC."""
    rng = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    out = np.zeros((height, width, 3))
    for c in range(3):
        for _ in range(6):
            fy, fx, p, a = (
                rng.uniform(0.005, 0.15),
                rng.uniform(0.005, 0.15),
                rng.uniform(0, 6.28),
                rng.uniform(0.3, 1),
            )
            out[..., c] += a * np.sin(fy * y + fx * x + p)
    out = (out - out.min()) / (out.max() - out.min())
    return np.round(out * 255).astype(np.uint8)
