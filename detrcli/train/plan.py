"""What a training run will do, resolved from what was asked: one value that is printed, stored and resumed from.

A `Request` holds what the user said; `make_plan` lays it over the variant's recipe. A resumed run takes its stored plan, and
`changed` lays over it whatever the user says again: what comes out different was changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from detrcli.config import assign, from_plain, in_range, settings, to_plain
from detrcli.data.loader import readers
from detrcli.data.places import anywhere
from detrcli.errors import UsageError
from detrcli.nn.inference import choose_device
from detrcli.plugins import Recipe, resolve
from detrcli.weights.warm import starting_from

Amp = Literal["off", "bf16", "fp16"]
BadData = Literal["stop", "skip"]
Logger = Literal["tensorboard", "wandb", "mlflow"]
OF_RECIPE = ("epochs", "batch_size", "lr")  # flags for what stands in the recipe
SEEDS = 2**63  # as many as TOML's whole numbers


_COUNTED = ("epochs", "steps", "batch_size", "device_batch", "eval_every", "patience")
_LEAST = dict.fromkeys(_COUNTED, 1) | dict.fromkeys(("lr", "seed", "workers", "save_every"), 0)


def _in_range(asked: Request | Plan) -> None:
    """The law of both, for what each of them has."""
    for name, least in _LEAST.items():
        if (value := getattr(asked, name, None)) is not None:
            in_range(name, value, least, most=SEEDS - 1 if name == "seed" else math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; None means: as the recipe, the data or the stored plan say."""

    data: str | None = None
    model: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    device_batch: int | None = None
    lr: float | None = None
    weights: str | None = None
    freeze: tuple[str, ...] | None = None
    device: str | None = None
    amp: Amp | None = None
    ema: float | None = None
    checkpointing: bool | None = None
    compile: bool | None = None
    deterministic: bool | None = None
    seed: int | None = None
    workers: int | None = None
    group_by_aspect: bool | None = None
    bad_data: BadData | None = None
    eval_every: int | None = None
    patience: int | None = None
    save_every: float | None = None
    data_root: str | None = None
    log: tuple[Logger, ...] | None = None
    changes: Mapping[str, Any] | None = None  # of `model.…` and `recipe.…`
    under: Request | None = None  # a file's, whose recipe and changes come before these

    def __post_init__(self) -> None:
        _in_range(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, whole: with the same plan, data and machine the same numbers come out."""

    data: str
    model: str  # family/variant
    config: Any  # the family's configuration
    recipe: Recipe
    device: str
    amp: Amp
    steps: int | None = None  # stop here, if before the last epoch's end
    device_batch: int | None = (
        None  # pictures at once on one device, at most; the rest of the batch is accumulated
    )
    weights: str | None = None
    freeze: tuple[str, ...] = ()  # parts of the model, or patterns of its parameters' names
    ema: float | None = None  # the decay of averaged weights
    checkpointing: bool = False  # compute activations twice rather than keep them
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    workers: int = 0
    group_by_aspect: bool = False
    bad_data: BadData = "stop"
    eval_every: int = 1  # epochs
    patience: int | None = None  # evaluations without a better score before the run ends
    save_every: float = 10.0  # minutes, beside the end of every epoch
    data_root: str | None = None
    log: tuple[Logger, ...] = ()

    def __post_init__(self) -> None:
        _in_range(self)

    def to_plain(self) -> dict[str, Any]:
        table: dict[str, Any] = to_plain(self)
        return table

    @staticmethod
    def from_plain(table: dict[str, Any]) -> Plan:
        plan = from_plain(Plan, table)
        kind = type(resolve(plan.model).variant.config)
        return replace(plan, config=from_plain(kind, plan.config, "model."))

    def anywhere(self) -> Plan:
        """The same from any folder, so that a run goes on wherever it is asked to."""
        weights, root = (path and anywhere(path) for path in (self.weights, self.data_root))
        return replace(self, data=anywhere(self.data), weights=weights, data_root=root)

    def settings(self) -> dict[str, Any]:
        """Every setting by its name, as flags and --set spell it."""
        return {re.sub(r"^config\.", "model.", name): value for name, value in settings(self).items()}

    def parts(self, world_size: int) -> int:
        """Backward passes to one step of the optimiser on each of so many ranks: the fewest that `device_batch` allows."""
        batch = self.recipe.batch_size
        if batch % world_size:
            raise UsageError(
                f"a batch of {batch} cannot be shared by {world_size} devices",
                hint=f"choose a multiple of {world_size} for --batch-size, and scale --lr with it",
            )
        share = batch // world_size
        most = min(self.device_batch or share, share)
        return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= most)


# what changes no number that a run computes, so that a resumed run may have it otherwise
HARMLESS = frozenset({"workers", "save_every", "data_root", "steps", "log"})


@dataclass(frozen=True, slots=True)
class _Tunable:
    """What --set can reach."""

    model: Any
    recipe: Recipe


def make_plan(request: Request) -> Plan:
    """The plan of a request: recipe chosen by its epochs, then a file's settings, then flags and --set."""
    if not request.data or not request.model:
        raise UsageError(
            "train needs data and a model", hint="for example: detr train shapes --model detr/tiny"
        )
    model = starting_from(request.model, request.weights)
    layers = [request.under, request] if request.under else [request]
    epochs = next((layer.epochs for layer in reversed(layers) if layer.epochs), None)
    device = str(choose_device(request.device))
    plan = Plan(
        data=request.data,
        model=model.name,
        config=model.variant.config,
        recipe=choose_recipe(model.variant.recipes, epochs),
        device=device,
        amp="bf16" if device.startswith("cuda") else "off",
        workers=readers(device),
    )
    return changed(plan, request)


def changed(plan: Plan, request: Request) -> Plan:
    """The plan with what the request says laid over it."""
    for layer in (request.under, request):
        if layer is not None:
            tuned = _tune(plan.config, _with_flags(plan.recipe, layer), dict(layer.changes or {}))
            agree(layer)
            plan = replace(plan, config=tuned.model, recipe=tuned.recipe)
    direct = {f.name for f in fields(Plan)} & {f.name for f in fields(Request)}
    said = {name: value for name in direct if (value := getattr(request, name)) not in (None, "")}
    if request.model:
        said["model"] = starting_from(request.model, request.weights).name
    if request.device is not None:
        said["device"] = str(choose_device(request.device))
    plan = replace(plan, **said).anywhere()
    _check(plan)
    return plan


def differences(old: Plan, new: Plan) -> dict[str, tuple[Any, Any]]:
    """The settings that two plans differ in, by name: `lr`, `seed`, `model.num_queries`, with both values."""
    before, after = (
        {name.removeprefix("recipe."): value for name, value in plan.settings().items()}
        for plan in (old, new)
    )
    names = dict.fromkeys([*before, *after])
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


def choose_recipe(recipes: tuple[Recipe, ...], epochs: int | None) -> Recipe:
    """The recipe whose length is nearest to the epochs asked for; the first without such a wish."""
    if epochs is None:
        return recipes[0]
    return min(recipes, key=lambda r: abs(r.epochs - epochs))


def agree(request: Request) -> None:
    """An error where a flag and --set, neither of which goes before the other, say different things."""
    for name in OF_RECIPE:
        flag, set_ = getattr(request, name), (request.changes or {}).get(f"recipe.{name}")
        if flag is not None and isinstance(set_, (int, float)) and flag != set_:
            raise UsageError(
                f"{name} is to be {flag}, and recipe.{name} {set_}, which is the same setting",
                hint=f"leave one of them out: --{name.replace('_', '-')} {flag}, or --set recipe.{name}={set_}",
            )


def _with_flags(recipe: Recipe, request: Request) -> Recipe:
    if request.epochs is not None and request.epochs != recipe.epochs:
        drops = tuple(max(1, round(epoch * request.epochs / recipe.epochs)) for epoch in recipe.drops)
        recipe = replace(recipe, epochs=request.epochs, lr_drop=drops or None)
    if request.batch_size is not None:
        recipe = replace(recipe, batch_size=request.batch_size)
    if request.lr is not None:
        recipe = replace(recipe, lr=request.lr)
    return recipe


def _tune(config: Any, recipe: Recipe, changes: dict[str, Any]) -> _Tunable:
    parts: dict[str, dict[str, Any]] = {"model": {}, "recipe": {}}
    for path, value in changes.items():
        part, _, rest = path.partition(".")
        if part not in parts or not rest:
            raise UsageError(
                f"--set cannot reach {path!r}",
                hint="paths begin with model. or recipe., as in --set recipe.lr=1e-4",
            )
        parts[part][rest] = value
    return _Tunable(assign(config, parts["model"], "model."), assign(recipe, parts["recipe"], "recipe."))


def _check(plan: Plan) -> None:
    batch, at_once = plan.recipe.batch_size, plan.device_batch
    if at_once is not None and at_once < batch and batch % at_once:
        raise UsageError(
            f"a batch of {batch} cannot be made of parts of {at_once}",
            hint=f"choose a divisor of {batch} for --device-batch",
        )
    if plan.ema is not None and not 0 < plan.ema < 1:
        raise UsageError(
            f"--ema needs a decay between 0 and 1 (value given: {plan.ema:g})", hint="--ema 0.9998"
        )
    if plan.amp == "fp16" and not plan.device.startswith(("cuda", "cpu")):
        raise UsageError(f"fp16 with loss scaling does not run on {plan.device}", hint="--amp off")
