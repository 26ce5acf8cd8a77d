"""Training Deformable DETR two-stage on the CPU, one thread, against the transformers package and a plain training loop.

    python benchmarks/training.py [--repeats 2]     512x512, batch 2, eight objects in each picture
    python benchmarks/training.py --short 256       smaller, to see that it works
                                                    needs: pip install 'detrcli[parity]'

Same weights, same batch, same run; every subject in a process of its own: CPU seconds of a step (best of the repeats, after one
warm-up), peak resident memory, and how far its loss is from that of transformers, relative. Ours is the step that `detr train`
takes (`Trainer.step`); theirs is forward with labels, backward, clipping and AdamW. The loss of the proposals is off, because
transformers has none. `kept` memory is what the allocator lever does; `detr train` keeps memory by itself, the step alone does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import CLASSES, KEPT, arguments, compare, one, ours, pictures, reference

OBJECTS = 8
REFERENCE = {"DETR_OPS": "reference"}

# name: (who, environment, precision)
SUBJECTS: dict[str, tuple[str, dict[str, str], str]] = {
    "transformers": ("theirs", {}, "off"),
    "transformers, kept memory": ("theirs", KEPT, "off"),
    "detrcli, no wheel": ("ours", REFERENCE, "off"),
    "detrcli": ("ours", {}, "off"),
    "detrcli, kept memory": ("ours", KEPT, "off"),
    "detrcli --amp bf16": ("ours", {}, "bf16"),
    "detrcli --amp bf16, kept memory": ("ours", KEPT, "bf16"),
}


def training(who: str, folder: Path, side: int, precision: str) -> Callable[[], Any]:
    """A function that takes one step and returns the loss of the first weights, without dropout, to compare."""
    import torch

    images, generator = pictures(2, side, side), torch.Generator().manual_seed(1)
    labels = torch.randint(1, CLASSES, (2, OBJECTS), generator=generator)
    boxes = torch.rand(2, OBJECTS, 4, generator=generator) * 0.3 + 0.3
    made = (_ours if who == "ours" else _theirs)(folder, images, labels, boxes, precision)
    loss, step = made
    with torch.no_grad():
        exact = loss()

    def run() -> Any:
        step()
        return exact

    return run


def _ours(folder: Path, images: Any, labels: Any, boxes: Any, precision: str) -> tuple[Any, Any]:
    import torch

    from detrcli.nn.criterion import SetCriterion
    from detrcli.plugins.contract import Recipe
    from detrcli.train.learner import DTYPES, Learner, Shared
    from detrcli.train.loop import Trainer
    from detrcli.train.optim import build_optimizer
    from detrcli.types import Batch, Losses, Output, Target

    whole = SetCriterion(kind="focal", class_cost=2, class_weight=1)  # the weight that transformers has

    def criterion(output: Output, targets: Sequence[Target], num_boxes: float | None = None) -> Losses:
        return whole(replace(output, proposals=None), targets, num_boxes)

    images = images.contiguous(memory_format=torch.channels_last)  # as the loader of `detr train` gives them
    net, recipe = ours(folder), Recipe(epochs=1, batch_size=2, lr=1e-5, lr_drop=1)
    targets = tuple(Target(a, b) for a, b in zip(labels, boxes, strict=True))
    mask, sizes = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool), torch.zeros(2, 2)
    batch = Batch(images, mask, targets, (0, 1), sizes)
    trainer = Trainer(
        net=net,
        learner=Shared(Learner(net, criterion, dtype=DTYPES[precision], takes_targets=False)),
        optimizer=build_optimizer(net, recipe),
        recipe=recipe,
        device="cpu",
        seed=0,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )

    def loss() -> Any:
        return criterion(net.eval()(images), targets).total

    def step() -> None:
        net.train()
        trainer.step([batch], 0, 0, 1.0)

    return loss, step


def _theirs(folder: Path, images: Any, labels: Any, boxes: Any, precision: str) -> tuple[Any, Any]:
    import torch

    model = reference(folder)
    wanted = [{"class_labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def loss() -> Any:
        return model.eval()(images, labels=wanted).loss

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(images, labels=wanted).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return loss, step


def main() -> None:
    import torch

    given = arguments(__doc__, 512, 2).parse_args()
    if given.one:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        who, _, precision = SUBJECTS[given.one]
        one(training(who, given.folder, given.short, precision), given.repeats)
        return
    names = [n for n in SUBJECTS if not given.only or n in ("transformers", *given.only)]
    compare(__file__, {name: SUBJECTS[name][1] for name in names}, given.short, given.repeats)


if __name__ == "__main__":
    main()
