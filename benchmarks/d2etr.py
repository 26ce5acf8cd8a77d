"""Deformable D²ETR against Deformable DETR on the same backbone, and its cached pools against pooling in every block.

python benchmarks/d2etr.py [--repeats 3]

One picture of 800 x 1066, CPU seconds of one thread, the two sides in turns, the least of all turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import detrcli
from detrcli_d2etr.fusion import CrossScaleFusion, pool_map, to_map, to_tokens


def models() -> dict[str, Callable[[], Any]]:
    image = torch.randn(1, 3, 800, 1066)
    made = {name: detrcli.create_model(name).eval() for name in ("d2etr/deformable", "deformable_detr/pvt2")}
    return {name: lambda module=module: module(image) for name, module in made.items()}


def pools() -> dict[str, Callable[[], Tensor]]:
    fusion = CrossScaleFusion((128, 320, 512), 256, coarser=True, blocks=3, heads=8, ffn=1024, pool=7).eval()
    maps = [torch.randn(1, c, 800 // s, 1066 // s) for c, s in ((128, 8), (320, 16), (512, 32))]
    empty = torch.zeros(1, 800, 1066, dtype=torch.bool)
    given = [(x, torch.zeros(1, *x.shape[2:], dtype=torch.bool)) for x in maps]
    ways: dict[str, Callable[[], Tensor]] = {
        "pooled once": lambda: fusion(given, empty, False)[-1][0],
        "pooled in every block": lambda: official_order(fusion, [*maps, maps[-1]]),
    }
    with torch.no_grad():
        torch.testing.assert_close(*(way() for way in ways.values()))
    return ways


def official_order(fusion: CrossScaleFusion, maps: list[Tensor]) -> Tensor:
    projected = [project(x) for project, x in zip(fusion.projections, maps, strict=True)]
    fused = projected[:1]
    for stage, x in zip(fusion.stages, projected[1:], strict=True):
        size, tokens = (x.shape[2], x.shape[3]), to_tokens(x)
        for block in stage.blocks:  # type: ignore[union-attr]
            tokens = block(tokens, size, [pool_map(y, fusion.pool, None) for y in fused])
        fused.append(to_map(stage.norm(tokens), size))  # type: ignore[operator]
    return fused[-1]


@torch.no_grad()
def least_seconds(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    return {name: round(min(times), 3) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for make in (pools, models):
        print(json.dumps(least_seconds(make(), repeats)))


if __name__ == "__main__":
    main()
