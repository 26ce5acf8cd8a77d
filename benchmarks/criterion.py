"""Matcher and criterion, forward and backward, against the transformers package: same tensors, same run, same result.

    python benchmarks/criterion.py [--repeats 30]        needs: pip install 'detrcli[parity]'

Six decoder layers, 300 queries, batch 4, seven objects an image, one thread. The transformers losses are called as its models
call them; weights are set alike on both sides.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from detrcli.nn.criterion import SetCriterion
from detrcli.types import Output, Target

LAYERS, BATCH, QUERIES, CLASSES, OBJECTS = 6, 4, 300, 91, 7


def inputs(channels: int) -> tuple[Tensor, Tensor, list[Target]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, BATCH, QUERIES, channels, generator=generator).requires_grad_()
    boxes = (torch.rand(LAYERS, BATCH, QUERIES, 4, generator=generator) * 0.4 + 0.3).requires_grad_()
    targets = [
        Target(
            torch.randint(CLASSES, (OBJECTS,), generator=generator),
            torch.rand(OBJECTS, 4, generator=generator) * 0.4 + 0.3,
        )
        for _ in range(BATCH)
    ]
    return logits, boxes, targets


def ours(kind: str, logits: Tensor, boxes: Tensor, targets: list[Target]) -> Callable[[], Tensor]:
    softmax = SetCriterion(kind="softmax", class_cost=1, class_weight=1)
    criterion = softmax if kind == "softmax" else SetCriterion(kind="focal", class_cost=2, class_weight=1)

    def run() -> Tensor:
        layers = [Output(a, b) for a, b in zip(logits, boxes, strict=True)]
        return criterion(Output(layers[-1].logits, layers[-1].boxes, aux=tuple(layers[:-1])), targets).total

    return run


def theirs(kind: str, logits: Tensor, boxes: Tensor, targets: list[Target]) -> Callable[[], Tensor]:
    from transformers import DeformableDetrConfig, DetrConfig
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
    if kind == "softmax":
        config, loss = DetrConfig(num_labels=CLASSES, auxiliary_loss=True), ForObjectDetectionLoss
    else:
        config = DeformableDetrConfig(num_labels=CLASSES, auxiliary_loss=True, class_cost=2, focal_alpha=0.25)
        loss = DeformableDetrForObjectDetectionLoss

    def run() -> Tensor:
        total: Tensor = loss(logits[-1], labels, torch.device("cpu"), boxes[-1], config, logits, boxes)[0]
        return total

    return run


def seconds(run: Callable[[], Tensor], inputs: tuple[Tensor, Tensor]) -> float:
    started = time.process_time()
    torch.autograd.grad(run(), inputs)
    return time.process_time() - started


def compare(kind: str, repeats: int) -> dict[str, float]:
    logits, boxes, targets = inputs(CLASSES + 1 if kind == "softmax" else CLASSES)
    mine, other = ours(kind, logits, boxes, targets), theirs(kind, logits, boxes, targets)
    a, b = mine(), other()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    for x, y in zip(
        torch.autograd.grad(a, (logits, boxes)), torch.autograd.grad(b, (logits, boxes)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    taken = [(seconds(mine, (logits, boxes)), seconds(other, (logits, boxes))) for _ in range(repeats)]
    best = [min(times) for times in zip(*taken, strict=True)]
    return {"ours_ms": 1e3 * best[0], "transformers_ms": 1e3 * best[1], "ratio": best[1] / best[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    results = {kind: compare(kind, repeats) for kind in ("focal", "softmax")}
    for kind, r in results.items():
        print(
            f"{kind:<8} ours {r['ours_ms']:6.2f} ms   transformers {r['transformers_ms']:6.2f} ms   {r['ratio']:.2f}x"
        )
    print(json.dumps({"torch": torch.__version__, "threads": 1, "repeats": repeats, "results": results}))


if __name__ == "__main__":
    main()
