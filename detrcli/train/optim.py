"""The optimiser of a recipe: AdamW in one group per learning rate, and the rate as a function of the step alone.

A rate that is a function has no state: resuming needs the step and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from detrcli.errors import UsageError
from detrcli.plugins.contract import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    """Trainable parameters by the factor of their learning rate, each group with its `factor`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factor_of(name, recipe.lr_factors), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in sorted(groups.items())]


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """The factor of the first pattern found in a parameter's name, else 1."""
    return next((factor for pattern, factor in factors.items() if re.search(pattern, name)), 1.0)


def check_patterns(model: nn.Module, recipe: Recipe, declared: Iterable[Recipe]) -> None:
    """Refuse a pattern without effect that the user set; those declared with a model may mean parameters that a setting removed."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in recipe.lr_factors.keys() - {p for other in declared for p in other.lr_factors}:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(
                f"recipe.lr_factors: no parameter's name has {pattern!r} in it",
                hint=f"a pattern of parameter names, such as {names[0]}",
            )


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )


def rate_at(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """The share of the base learning rate that step `step` (from 0) is taken with; that a run stops earlier than its recipe
    changes none of them."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "step":
        return float(0.1 ** sum(step >= epoch * steps_per_epoch for epoch in recipe.drops))
    whole = recipe.epochs * steps_per_epoch
    done = (step - recipe.warmup_steps) / max(1, whole - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * group["factor"] * share
