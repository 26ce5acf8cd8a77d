"""What a training run will do, resolved from what was asked: one value that is printed, stored and resumed from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from detrcli.config import assign, from_plain, to_plain
from detrcli.errors import UsageError
from detrcli.nn.inference import choose_device
from detrcli.plugins import Recipe, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

Amp = Literal["off", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; None means: as the recipe or the data say."""

    data: str
    model: str
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    device_batch: int | None = None
    lr: float | None = None
    weights: str | None = None
    device: str | None = None
    amp: Amp | None = None
    seed: int = 0
    workers: int = 0
    eval_every: int = 1
    data_root: str | None = None
    changes: Mapping[str, Any] | None = None  # of `model.…` and `recipe.…`


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, whole: with the same plan, data and machine the same numbers come out."""

    data: str
    model: str  # family/variant
    config: Any  # the family's configuration
    recipe: Recipe
    steps: int | None  # stop here, if before the last epoch's end
    accumulate: int  # backward passes to one step of the optimiser
    weights: str | None
    device: str
    amp: Amp
    seed: int
    workers: int
    eval_every: int
    data_root: str | None

    @property
    def device_batch(self) -> int:
        return self.recipe.batch_size // self.accumulate

    def to_plain(self) -> dict[str, Any]:
        table: dict[str, Any] = to_plain(self)
        return table

    @staticmethod
    def from_plain(table: dict[str, Any]) -> Plan:
        model = resolve(table["model"])
        config = from_plain(type(model.variant.config), table["config"])
        return Plan(**{**table, "config": config, "recipe": from_plain(Recipe, table["recipe"])})


@dataclass(frozen=True, slots=True)
class _Tunable:
    """What --set can reach."""

    model: Any
    recipe: Recipe


def make_plan(request: Request) -> Plan:
    """The plan of a request: recipe chosen by its epochs, flags over recipe, --set over both."""
    model = resolve(request.model)
    recipe = _with_flags(choose_recipe(model.variant.recipes, request.epochs), request)
    tuned = _tune(model.variant.config, recipe, dict(request.changes or {}))
    device = str(choose_device(request.device))
    return Plan(
        data=request.data,
        model=model.name,
        config=tuned.model,
        recipe=tuned.recipe,
        steps=request.steps,
        accumulate=_accumulation(tuned.recipe.batch_size, request.device_batch),
        weights=request.weights,
        device=device,
        amp=request.amp or ("bf16" if device.startswith("cuda") else "off"),
        seed=request.seed,
        workers=request.workers,
        eval_every=request.eval_every,
        data_root=request.data_root,
    )


def choose_recipe(recipes: tuple[Recipe, ...], epochs: int | None) -> Recipe:
    """The recipe whose length is nearest to the epochs asked for; the first without such a wish."""
    if epochs is None:
        return recipes[0]
    return min(recipes, key=lambda r: abs(r.epochs - epochs))


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


def _accumulation(batch_size: int, device_batch: int | None) -> int:
    if device_batch is None or device_batch >= batch_size:
        return 1
    if batch_size % device_batch:
        raise UsageError(
            f"a batch of {batch_size} cannot be made of parts of {device_batch}",
            hint=f"choose a divisor of {batch_size} for --device-batch",
        )
    return batch_size // device_batch
