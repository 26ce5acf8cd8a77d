"""Exported models: what it costs to make one, and how fast its runtime is beside eager, with and without native operators.

    python benchmarks/export.py cost [--model M] [--format onnx|pt2|openvino] [--threads T]
    python benchmarks/export.py latency [--model M] [-n N] [--height H --width W]

`cost` is seconds and peak memory of `detr export --weights random`, verification and all, in a process of its own, and the largest and
the largest median difference over the batches, with the one that each batch was judged by. `latency` is one thread,
random weights, one picture; ways take turns in one process, so that other load on the machine hits all of them. Figures are CPU
seconds, the best of N. Eager is the model as `detr predict` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detrcli.export.description import SUFFIXES

FORMATS = {kind: suffix for suffix, kind in SUFFIXES.items()}


def cost(model: str, kind: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, before = Path(folder) / f"model{FORMATS[kind]}", time.monotonic()
        command = [sys.executable, "-m", "detrcli", "export", "--model", model, "--weights", "random"]
        command += ["--out", str(out), "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=threads(count))
        wall = time.monotonic() - before
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(done.stdout)
        return {
            "model": model,
            "format": kind,
            "threads": count,
            "wall_s": round(wall, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            "peak_mb": used.ru_maxrss // 1024,
            "file_mb": round(sum(out.with_name(name).stat().st_size for name in found["sha256"]) / 1e6, 1),
            "largest_difference": found["verification"]["largest"],
            "median_difference": found["verification"]["median"],
            "judged_by": [case["rule"] for case in found["verification"]["cases"]],
        }


def threads(count: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(count)}


def latency(name: str, count: int, size: tuple[int, int]) -> dict[str, Any]:
    import torch

    import detrcli
    from detrcli import ops
    from detrcli.export.run import untrained
    from detrcli.nn.inference import infer
    from detrcli.nn.speed import fastest
    from detrcli.ops.dispatch import missing
    from detrcli.plugins import resolve

    torch.set_num_threads(1)
    model = fastest(untrained(resolve(name)).module)
    images = torch.randn(1, 3, *size)
    ways: dict[str, Callable[[], Any]] = {"eager, plain torch": _using("reference", infer, model, images)}
    if missing("cpu") is None:
        ways["eager, native operators"] = _using("native", infer, model, images)
    with tempfile.TemporaryDirectory() as folder:
        formats = {"ONNX Runtime": (".onnx", "onnxruntime"), "OpenVINO": (".xml", "openvino")}
        for title, (suffix, package) in formats.items():
            if find_spec(package):
                made = detrcli.export(name, Path(folder) / f"m{suffix}", weights="random", verify=False)
                ways[title] = _using("reference", infer, detrcli.load(str(made.file)).model, images)
        seconds = _in_turns(ways, count)
    eager = seconds["eager, plain torch"]
    return {
        "model": name,
        "size": size,
        "torch": torch.__version__,
        "operators": ops.backend("cpu").reason,
        "cpu_s": {way: round(s, 3) for way, s in seconds.items()},
        "times_as_fast_as_plain": {way: round(eager / s, 2) for way, s in seconds.items()},
    }


def _using(mode: Any, infer: Callable[..., Any], model: Any, images: Any) -> Callable[[], Any]:
    from detrcli import ops

    def run() -> Any:
        with ops.use(mode):
            return infer(model, images, None)

    return run


def _in_turns(ways: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(count + 1):  # the first warms up
        for way, run in ways.items():
            before = time.process_time()
            run()
            best[way] = min(best[way], time.process_time() - before)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cost", "latency"])
    parser.add_argument("--model", default="deformable_detr/r50-two-stage")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="onnx", help="of the file that cost is for"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    given = parser.parse_args()
    if given.what == "cost":
        print(json.dumps(cost(given.model, given.format, given.threads), indent=1))
    else:
        print(json.dumps(latency(given.model, given.n, (given.height, given.width)), indent=1))


if __name__ == "__main__":
    main()
