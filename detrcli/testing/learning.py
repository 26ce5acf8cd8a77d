"""What a criterion makes of any objects, and that a model learns from it; on the small variants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrcli.plugins import Model
from detrcli.testing.samples import CLASSES, objects, pictures, run_small, two_targets
from detrcli.types import Target


def every_parameter_learns(model: Model) -> None:
    for module in run_small(model):
        module.train()
        total = _loss(model, module, two_targets())
        total.backward()  # type: ignore[no-untyped-call]
        idle = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (
            f"no gradient reaches {', '.join(idle[:5])}: distributed training would wait for them"
        )


def losses_stand_odd_targets(model: Model) -> None:
    """No objects in one picture, in none; more objects than queries."""
    for module in run_small(model):
        module.train()
        one, none = two_targets(), [objects(0), objects(0)]
        for targets in ([one[0], objects(0)], none, [objects(400), objects(1)]):
            total = _loss(model, module, targets)
            assert torch.isfinite(total), (
                f"the loss is not finite for {[len(t.labels) for t in targets]} objects"
            )


def the_loss_falls(model: Model) -> None:
    """A few steps on two pictures: gradients point the right way."""
    for module in run_small(model):
        module.train()
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        totals = []
        for _ in range(12):
            total = _loss(model, module, two_targets())
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            totals.append(float(total.detach()))
        assert min(totals[-3:]) < 0.9 * totals[0], (
            f"12 steps on the same two pictures leave the loss at {totals[-1]:.3g}, from {totals[0]:.3g}"
        )


def _loss(model: Model, module: nn.Module, targets: list[Target]) -> Tensor:
    images, mask = pictures()
    extra = (targets,) if model.family.takes_targets else ()
    criterion = model.criterion(CLASSES)
    return criterion(module(images, mask, *extra), targets).total
