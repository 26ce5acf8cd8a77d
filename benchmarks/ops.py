"""Speed of the deformable attention operators: ours, the plain grid_sample formulation, and transformers' module.

    python benchmarks/ops.py [--device cpu] [--threads 1] [--batch 1 2 4] [--allocator kept] [--quick] [--json FILE]
    python benchmarks/ops.py --fuzz 40 [--seed 0]   sizes, tasks and dtypes drawn at random: where are we slower?

One process, one run; the contenders take turns of 50 ms or a call inside every repetition, so a busy machine slows all. On the CPU
the figure is the process's CPU time (wall time where threads > 1), on CUDA the time between events; the best of the
repetitions counts. Freed memory stays in the process for all of them, as in detr train, eval and predict; with `--allocator plain`
the C library maps large blocks anew, as in any other Python program. Every row carries the ratio to `grid_sample`. Shapes: four levels of
an 800x1333 picture (22,223 tokens), 8 heads of 32 channels, 4 points; offsets are the papers' initial ring plus noise of two pixels.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from detrcli import ops
from detrcli.nn import speed
from detrcli.ops import dispatch

Shapes = list[tuple[int, int]]
SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]
MOST = 1 << 22  # numbers that a drawn call samples or holds at most
TURN = 50.0  # milliseconds that each contender has before the next one's turn
SHORT_TURN = 5.0  # where sizes are many and drawn


@dataclass(frozen=True)
class Layer:
    """The sizes of an attention layer."""

    shapes: Shapes
    heads: int
    depth: int
    points: int


PAPER = Layer(SHAPES, heads=8, depth=32, points=4)


@dataclass(frozen=True)
class Inputs:
    """What one attention layer computes before it samples."""

    value: Tensor  # (B, S, M, D)
    reference: Tensor  # (B, Q, L, 2)
    offsets: Tensor  # (B, Q, M, L, P, 2)
    logits: Tensor  # (B, Q, M, L*P)
    query: Tensor  # (B, Q, M, D)
    shapes: Shapes

    def floats(self) -> list[Tensor]:
        return [self.value, self.offsets, self.logits, self.query]


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    task: str
    shape: str
    batch: int
    dtype: str
    contender: str
    milliseconds: float
    ratio: float  # of grid_sample's time to this one


def make_inputs(
    queries: int | None, batch: int, dtype: torch.dtype, device: str, layer: Layer = PAPER
) -> Inputs:
    """Encoder inputs (queries None: one at every token) or decoder inputs (queries anywhere)."""
    generator = torch.Generator().manual_seed(0)
    heads, depth, points, levels = layer.heads, layer.depth, layer.points, len(layer.shapes)
    if queries is None:
        grids = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
            for h, w in layer.shapes
        ]
        centres = torch.cat(grids).flip(-1).expand(batch, -1, -1)
    else:
        centres = torch.rand(batch, queries, 2, generator=generator)
    count, tokens = centres.shape[1], sum(h * w for h, w in layer.shapes)
    angles = torch.arange(heads) * (2 * torch.pi / heads)
    ring = torch.stack([angles.cos(), angles.sin()], -1)
    ring = ring / ring.abs().amax(-1, keepdim=True)
    steps = ring[:, None, None] * torch.arange(1, points + 1)[None, None, :, None]
    noise = torch.randn(batch, count, heads, levels, points, 2, generator=generator) * 2
    tensors = (
        torch.randn(batch, tokens, heads, depth, generator=generator).to(dtype),
        centres[:, :, None].expand(-1, -1, levels, -1).contiguous(),
        (steps + noise).to(dtype),
        torch.randn(batch, count, heads, levels * points, generator=generator).to(dtype),
        torch.randn(batch, count, heads, depth, generator=generator).to(dtype),
    )
    return Inputs(*(tensor.to(device) for tensor in tensors), layer.shapes)


def locations_and_weights(x: Inputs) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([(w, h) for h, w in x.shapes], device=x.value.device, dtype=x.reference.dtype)
    locations = x.reference[:, :, None, :, None] + x.offsets / sizes[:, None]
    weights = x.logits.softmax(-1).view(x.offsets.shape[:5])
    return locations, weights


def sampled_levels(rows: Tensor, shapes: Shapes, locations: Tensor) -> Tensor:
    """(B*M, D, Q, L*P) by grid_sample, in rows' dtype, as public code does it."""
    batch, _, heads, depth = rows.shape
    grids = (2 * locations - 1).to(rows.dtype).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
    levels = torch.split(rows, [h * w for h, w in shapes], dim=1)
    sampled = [
        F.grid_sample(
            level.flatten(2).transpose(1, 2).reshape(batch * heads, depth, h, w),
            grids[:, :, index],
            align_corners=False,
        )
        for index, (level, (h, w)) in enumerate(zip(levels, shapes, strict=True))
    ]
    return torch.stack(sampled, dim=-2).flatten(-2)


def grid_msda(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points = weights.shape
    shares = weights.to(value.dtype).transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    out = (sampled_levels(value, shapes, locations) * shares).sum(-1)
    answer: Tensor = out.view(batch, -1, queries).transpose(1, 2).contiguous()
    return answer


def grid_kda(x: Inputs) -> Tensor:
    batch, queries, heads, depth = x.query.shape
    locations, _ = locations_and_weights(x)
    # the official code samples twice, for keys and for values, even where they are one tensor
    keys, values = (sampled_levels(x.value, x.shapes, locations).permute(0, 2, 3, 1) for _ in range(2))
    query = x.query.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B*M, Q, 1, D)
    weights = (query @ keys.transpose(-1, -2) * depth**-0.5).softmax(-1)
    out = (weights @ values).view(batch, heads, queries, depth)
    return out.transpose(1, 2).flatten(2)


def transformers_msda() -> Callable[[Inputs], Tensor] | None:
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError:
        return None
    module = MultiScaleDeformableAttention()

    def attend(x: Inputs) -> Tensor:
        locations, weights = locations_and_weights(x)
        answer: Tensor = module(
            x.value,
            torch.tensor(x.shapes),
            x.shapes,
            None,
            locations.to(x.value.dtype),
            weights.to(x.value.dtype),
            64,
        )
        return answer

    return attend


def contenders(task: str) -> dict[str, Callable[[Inputs], Tensor]]:
    """What competes on a task; each takes the layer's raw outputs where it can."""
    if task == "kda":
        return {
            "grid_sample": grid_kda,
            "ours": lambda x: ops.kda(x.query, x.value, x.value, x.shapes, x.reference, x.offsets),
        }
    if task == "fused":
        others = {"transformers": transformers_msda()}
        return {
            "grid_sample": lambda x: grid_msda(x.value, x.shapes, *locations_and_weights(x)),
            "ours": lambda x: ops.msda_fused(x.value, x.shapes, x.reference, x.offsets, x.logits),
            **{name: attend for name, attend in others.items() if attend is not None},
        }
    return {
        "grid_sample": lambda x: grid_msda(x.value, x.shapes, x.offsets, x.logits),
        "ours": lambda x: ops.msda(x.value, x.shapes, x.offsets, x.logits),
    }


def inputs_of(
    task: str, queries: int | None, batch: int, dtype: torch.dtype, device: str, layer: Layer = PAPER
) -> Inputs:
    """For plain msda, locations and weights take the places of offsets and logits: they are made outside the clock."""
    x = make_inputs(queries, batch, dtype, device, layer)
    if task != "msda":
        return x
    locations, weights = locations_and_weights(make_inputs(queries, batch, torch.float32, device, layer))
    return Inputs(x.value, x.reference, locations, weights, x.query, x.shapes)


def timed(run: Callable[[], None], device: str, threads: int, turn: float = TURN) -> float:
    """Milliseconds of a call; where they are few, of calls one after another, which do not find the other's caches."""
    spent = clocked(run, device, threads)
    if spent >= turn:
        return spent
    calls = int(turn / spent) + 1
    return clocked(lambda: [run() for _ in range(calls)], device, threads) / calls


def clocked(run: Callable[[], object], device: str, threads: int) -> float:
    if device == "cuda":
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    clock = time.process_time if threads == 1 else time.perf_counter
    before = clock()
    run()
    return (clock() - before) * 1e3


def runner(attend: Callable[[Inputs], Tensor], x: Inputs, backward: bool) -> Callable[[], None]:
    if not backward:

        def forward_only() -> None:
            with torch.no_grad():
                attend(x)

        return forward_only
    leaves = [tensor.detach().requires_grad_() for tensor in x.floats()]
    value, offsets, logits, query = leaves
    with_grad = Inputs(value, x.reference, offsets, logits, query, x.shapes)

    def both() -> None:
        out = attend(with_grad)
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return both


def race(
    runs: dict[str, Callable[[], None]], repeat: int, args: argparse.Namespace, turn: float = TURN
) -> dict[str, float]:
    """The best time of each contender, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repeat + 1):
        for name, run in runs.items():
            spent = timed(run, args.device, args.threads, turn)
            if repetition:  # the first one warms up
                times[name].append(spent)
    return {name: min(values) for name, values in times.items()}


def measure(
    task: str, shape: str, batch: int, dtype: torch.dtype, backward: bool, args: argparse.Namespace
) -> list[Row]:
    queries = None if shape == "encoder" else int(shape.removeprefix("decoder-"))
    x = inputs_of(task, queries, batch, dtype, args.device)
    runs = {name: runner(attend, x, backward) for name, attend in contenders(task).items()}
    best = race(runs, args.repeat if queries is None else args.repeat * 5, args)
    label = f"{task} forward+backward" if backward else f"{task} forward"
    kind = str(dtype).removeprefix("torch.")
    return [
        Row(label, shape, batch, kind, name, round(t, 3), round(best["grid_sample"] / t, 2))
        for name, t in best.items()
    ]


def plan(args: argparse.Namespace) -> list[tuple[str, str, int, torch.dtype, bool]]:
    shapes = ["encoder", "decoder-300", "decoder-900"]
    rows = [
        (task, shape, batch, torch.float32, backward)
        for batch in args.batch
        for shape in shapes
        for task in ("msda", "fused", "kda")
        for backward in (False, True)
    ]
    rows += [(task, shape, 1, torch.bfloat16, False) for shape in shapes for task in ("msda", "fused", "kda")]
    return [row for row in rows if not args.quick or row[1] != "decoder-900"]


def drawn(rng: random.Random) -> tuple[Layer, int, int]:
    """A layer, queries and pictures: small and large alike, odd sizes too, below a bound."""

    def any_size(most: int) -> int:
        return round(most ** rng.random())

    shapes = [(any_size(64), any_size(64)) for _ in range(rng.randint(1, 5))]
    depth = rng.choice([1, 3, 8, 16, 30, 32, 64, 71, 128])
    layer = Layer(shapes, rng.choice([1, 2, 3, 4, 8, 16]), depth, rng.randint(1, 8))
    queries, batch = any_size(2000), rng.randint(1, 4)
    rows = max(sum(h * w for h, w in shapes), queries * len(shapes) * layer.points)
    return (layer, queries, batch) if batch * rows * layer.heads * depth <= MOST else drawn(rng)


def fuzz(args: argparse.Namespace) -> None:
    """Ours against grid_sample on drawn sizes: how many are slower, and the worst."""
    rng = random.Random(args.seed)
    ratios: list[tuple[float, str]] = []
    for _ in range(args.fuzz):
        layer, queries, batch = drawn(rng)
        task, backward = rng.choice(["msda", "fused", "kda"]), rng.random() < 0.5
        dtype = rng.choice([torch.float32, torch.bfloat16])
        x = inputs_of(task, queries, batch, dtype, args.device, layer)
        attends = contenders(task)
        runs = {name: runner(attends[name], x, backward) for name in ("grid_sample", "ours")}
        best = race(runs, args.repeat, args, SHORT_TURN)
        what = f"{task}{' + backward' if backward else ''} {dtype}, {batch} x {queries} queries, {layer}"
        ratios.append((best["grid_sample"] / best["ours"], f"{best['ours']:.3f} ms: {what}"))
    ratios.sort()
    slower = sum(ratio < 1 for ratio, _ in ratios)
    middle = statistics.median(ratio for ratio, _ in ratios)
    print(f"{slower} of {args.fuzz} slower than grid_sample; median {middle:.1f} times; the worst:")
    print(*(f"{ratio:6.2f} times, {text}" for ratio, text in ratios[:10]), sep="\n")


def peak_memory() -> list[tuple[str, float]]:
    """Growth of the peak resident size in MiB, ours first: a peak never falls again."""
    x = make_inputs(None, 1, torch.float32, "cpu")
    grown = []
    for name, attend in reversed(contenders("kda").items()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.no_grad():
            attend(x)
        grown.append((name, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    return grown


def machine(device: str, threads: int) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if device == "cpu" and cpu.exists():
        name = next(line.split(":", 1)[1].strip() for line in cpu.open() if line.startswith("model name"))
    isa = "none"
    if dispatch.wheel.cpu is not None:
        from detrcli_ops import isa as in_use

        isa = in_use()
    name_and_reason = ops.backend(device)
    return {
        "device": name,
        "threads": str(threads),
        "torch": torch.__version__,
        "ours": f"{name_and_reason.name} ({name_and_reason.reason})",
        "instruction set": isa,
    }


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| task | shape | batch | dtype | contender | ms | times grid_sample |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.task} | {r.shape} | {r.batch} | {r.dtype} | {r.contender} | {r.milliseconds:.2f} | {r.ratio:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--allocator", choices=["kept", "plain"], default="kept")
    parser.add_argument("--quick", action="store_true", help="encoder and 300 queries only")
    parser.add_argument("--fuzz", type=int, metavar="N", help="N drawn sizes instead, and the worst of them")
    parser.add_argument("--seed", type=int, default=0, help="of what --fuzz draws")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = peak_memory() if args.device == "cpu" and not args.fuzz else []
    if args.allocator == "kept":
        speed.keep_memory()
    if args.fuzz:
        print(*(f"{key}: {value}" for key, value in machine(args.device, args.threads).items()), sep="\n")
        fuzz(args)
        return
    rows: list[Row] = []
    for job in plan(args):
        rows += measure(*job, args)
        print(
            *(f"{r.task} {r.shape} {r.contender} {r.milliseconds}" for r in rows[-2:]),
            sep="; ",
            file=sys.stderr,
        )
    about = machine(args.device, args.threads) | {"memory": args.allocator}
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    print(table(rows))
    print(*(f"peak memory of kda forward, {name}: +{mib:.0f} MiB" for name, mib in memory), sep="\n")
    if args.json:
        report = {"machine": about, "rows": [asdict(r) for r in rows], "kda_peak_mib": dict(memory)}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
