"""How fast the tiny models learn: every installed FAMILY/tiny on the same pictures, epochs and seeds, as a table and a plot.

    python benchmarks/convergence.py [--epochs 8] [--seeds 0] [--models detr dynamic_detr] [--runs runs/convergence]

Writes docs/convergence.md and docs/images/convergence.svg. Each model trains by its own recipe, stretched to the epochs; the
data set is `shapes`. Runs that are finished in --runs are not repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from detrcli.plugins import Model, models, resolve
from detrcli.train.plan import Request
from detrcli.train.run import train

DOCS = Path(__file__).parent.parent / "docs"
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # told apart by colour-blind readers
WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 640, 320, 50, 40, 180


@dataclass(frozen=True, slots=True)
class Curve:
    """One model over its seeds."""

    model: Model
    ap: list[list[float]]  # per seed, one value an epoch
    ap50: list[list[float]]
    seconds: float  # CPU time of training and scoring, mean over seeds

    def mean(self, values: list[list[float]]) -> list[float]:
        return [statistics.fmean(column) for column in zip(*values, strict=True)]


def measure(model: Model, epochs: int, seeds: list[int], runs: Path) -> Curve:
    folders = [run(model, epochs, seed, runs) for seed in seeds]
    scores = [scores_of(folder) for folder in folders]
    seconds = [json.loads((folder / "cpu_seconds.json").read_text()) for folder in folders]
    return Curve(
        model,
        [[s["ap"] for s in one] for one in scores],
        [[s["ap50"] for s in one] for one in scores],
        statistics.fmean(seconds),
    )


def run(model: Model, epochs: int, seed: int, runs: Path) -> Path:
    """The folder of a finished run: one that is there, one that goes on, or a new one."""
    folder = runs / f"{model.family.name}-{epochs}-{seed}"
    about, clock = folder / "run.json", folder / "cpu_seconds.json"
    if about.exists() and json.loads(about.read_text())["status"] == "finished":
        return folder
    print(f"{model.name}, seed {seed} …", file=sys.stderr)
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    started = time.process_time()
    request = Request(data="shapes", model=model.name, epochs=epochs, seed=seed, device="cpu")
    result = train(request, out=folder, resume="auto")
    clock.write_text(json.dumps(before + time.process_time() - started))
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)
    return folder


def scores_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "ap" in line]


def page(which: str, curves: list[Curve], epochs: int, seeds: list[int], command: str) -> str:
    marks = sorted({1, epochs // 4, epochs // 2, epochs} - {0})
    head = ["model", "parameters", *(f"AP50, epoch {m}" for m in marks), f"AP, epoch {epochs}", "CPU minutes"]
    rows = [
        [
            f"`{c.model.name}`",
            f"{c.model.variant.params:,}",
            *(spread([one[m - 1] for one in c.ap50]) for m in marks),
            spread([one[-1] for one in c.ap]),
            f"{c.seconds / 60:.1f}",
        ]
        for c in curves
    ]
    table = [head, ["---", "---:", *["---:"] * (len(head) - 2)], *rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"""<!-- written by benchmarks/convergence.py; changes are lost -->

# How fast the models learn

{which} on the same 2,000 drawn pictures (`shapes`), {epochs} epochs of 125 steps of 16, seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))};
scored on 200 other pictures after each epoch. Each model has its own recipe, stretched to the same epochs.
These are small models on an easy task: the order is telling, the numbers say nothing about COCO.

![AP50 over epochs](images/convergence.svg)

{lines}

Measured: `{command}`, torch {torch.__version__.split("+")[0]}, one thread.
"""


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def plot(curves: list[Curve], epochs: int) -> str:
    """AP50 over epochs as SVG: a line a model, a dot an epoch."""
    right, top = WIDTH - LEGEND, 15
    width, height = right - LEFT, HEIGHT - BOTTOM - top

    def at(epoch: float, value: float) -> tuple[float, float]:
        return LEFT + width * epoch / epochs, top + height * (1 - value)

    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        _, y = at(0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ccc"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for epoch in range(0, epochs + 1, max(1, epochs // 8)):
        x, _ = at(epoch, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 4}" text-anchor="middle">epochs</text>')
    for i, (curve, colour) in enumerate(zip(curves, COLOURS * len(curves), strict=False)):
        points = [at(0, 0), *(at(e + 1, v) for e, v in enumerate(curve.mean(curve.ap50)))]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points[1:]]
        label = curve.model.family.name
        parts.append(f'<text x="{right + 16}" y="{top + 14 + 20 * i}" fill="{colour}">{label}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>AP50 over epochs</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", help="families [default: all that have a tiny variant]")
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = [m.family.name for m in models() if m.variant.name == "tiny"]
    families = arguments.models or every
    curves = [
        measure(resolve(f"{family}/tiny"), arguments.epochs, arguments.seeds, arguments.runs)
        for family in families
    ]
    curves.sort(key=lambda c: -statistics.fmean(one[-1] for one in c.ap50))
    command = f"python benchmarks/convergence.py --epochs {arguments.epochs} --seeds {' '.join(map(str, arguments.seeds))}"
    (DOCS / "images").mkdir(exist_ok=True)
    which = "Every tiny model" if set(families) == set(every) else "Tiny models"
    (DOCS / "convergence.md").write_text(page(which, curves, arguments.epochs, arguments.seeds, command))
    (DOCS / "images" / "convergence.svg").write_text(plot(curves, arguments.epochs))


if __name__ == "__main__":
    main()
