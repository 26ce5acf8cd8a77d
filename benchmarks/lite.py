"""Lite DETR's encoder against the full one, and key-aware attention against plain deformable attention: whole models, one thread.

python benchmarks/lite.py [--size 800 1066] [--runs 5] [--json FILE]

Models take turns, run by run; the encoder's time is a part of the same passes. `eager` is key-aware attention in plain torch; it
samples once where key and value are one tensor, the released code twice. Freed memory stays in the process, as in detr predict.
Training memory is the peak that a forward and backward pass adds, the median of three processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from detrcli import ops
from detrcli.config import assign
from detrcli.nn.speed import fastest, keep_memory
from detrcli.plugins import Model, resolve
from detrcli.profile.parts import Running

LITE, FULL = "lite_deformable/h3l1-2x3", "deformable_detr/r50-two-stage"
SUBJECTS: dict[str, tuple[str, bool, ops.Mode]] = {  # model, key-aware, operators
    "full encoder": (FULL, True, "auto"),
    "lite, key-aware": (LITE, True, "auto"),
    "lite, plain attention": (LITE, False, "auto"),
    "lite, key-aware, eager": (LITE, True, "reference"),
}


def model(name: str, key_aware: bool) -> Model:
    found = resolve(name)
    return found if key_aware else found.configured(assign(found.config, {"encoder.key_aware": False}))


def inference(size: tuple[int, int], runs: int) -> dict[str, dict[str, float]]:
    """Median seconds of the whole model and of its encoder."""
    images = torch.randn(1, 3, *size)
    nets = {name: fastest(model(which, aware).build()) for name, (which, aware, _) in SUBJECTS.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in SUBJECTS}
    for turn in range(runs + 1):
        for name, net in nets.items():
            with ops.use(SUBJECTS[name][2]), torch.inference_mode():
                seconds = timed(net, images)
            if turn:  # the first warms up
                taken[name].append(seconds)
    return {
        name: {
            "model": statistics.median(w for w, _ in rows),
            "encoder": statistics.median(e for _, e in rows),
        }
        for name, rows in taken.items()
    }


def timed(net: torch.nn.Module, images: torch.Tensor) -> tuple[float, float]:
    marks: list[tuple[str, float]] = []
    with Running(
        net, {"encoder": ("encoder",)}, switched=lambda: marks.append((running.part, now()))
    ) as running:
        begun = now()
        net(images)
        whole = now() - begun
    entered = [at for part, at in marks if part == "other"]
    encoder = marks[-1][1] - entered[0]
    return whole, encoder


def now() -> float:
    return time.process_time()


def training_memory(name: str, size: tuple[int, int]) -> int:
    """Bytes that a training pass of this process adds at most."""
    which, aware, operators = SUBJECTS[name]
    net = model(which, aware).build().train()
    images = torch.randn(1, 3, *size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ops.use(operators):
        output = net(images)
        (output.logits.sum() + output.boxes.sum()).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measured_apart(name: str, size: tuple[int, int]) -> int:
    """`training_memory` in a process of its own."""
    command = [sys.executable, __file__, "--size", *map(str, size), "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1066])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    size = (args.size[0], args.size[1])
    if args.memory_of:
        print(training_memory(args.memory_of, size))
        return
    found = inference(size, args.runs)
    for name in SUBJECTS:
        found[name]["training_bytes"] = statistics.median(measured_apart(name, size) for _ in range(3))
    first, plain = found["full encoder"], found["lite, plain attention"]
    print(
        f"{'':<24} {'model s':>8} {'full/':>6} {'/plain':>6} {'encoder s':>9} {'full/':>6} {'/plain':>6} {'MiB':>6} {'/plain':>6}"
    )
    for name, row in found.items():
        cells = [
            f"{row['model']:8.2f} {first['model'] / row['model']:6.2f} {row['model'] / plain['model']:6.2f}",
            f"{row['encoder']:9.2f} {first['encoder'] / row['encoder']:6.2f} {row['encoder'] / plain['encoder']:6.2f}",
            f"{row['training_bytes'] / 2**20:6.0f} {row['training_bytes'] / plain['training_bytes']:6.2f}",
        ]
        print(f"{name:<24} {' '.join(cells)}")
    if args.json:
        args.json.write_text(json.dumps({"size": size, "runs": args.runs, "subjects": found}, indent=1))


if __name__ == "__main__":
    main()
