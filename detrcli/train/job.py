"""A run that is ready to start: data, model, optimiser and loss, put together as the plan says."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from detrcli import distributed
from detrcli.data import catalog
from detrcli.data.annotations import Dataset
from detrcli.data.check import Seen, pictures
from detrcli.data.classes import compared
from detrcli.data.defects import KINDS
from detrcli.data.loader import Batches, train_loader
from detrcli.data.masks import without_outline
from detrcli.data.structure import repair, shared_pictures
from detrcli.data.transforms import training
from detrcli.environment import bf16_speed
from detrcli.errors import DataError, DetrError
from detrcli.evaluate.run import match_categories
from detrcli.nn.backbone import Backbone
from detrcli.nn.speed import choose_threads, keep_memory, levers
from detrcli.plugins import Model, resolve
from detrcli.train.ema import Average
from detrcli.train.guard import Ways
from detrcli.train.learner import DTYPES, Learner, Shared
from detrcli.train.loop import Trainer
from detrcli.train.optim import build_optimizer, check_patterns
from detrcli.train.plan import Plan
from detrcli.train.record import Record
from detrcli.train.thrift import freeze, recompute
from detrcli.types import Categories
from detrcli.weights.warm import told, warm_start

FEW = 10_000  # training pictures, with which DETR and its kin score close to nothing
LONG = 0.2  # of a run's steps, that its rate rises in


@dataclass(slots=True, kw_only=True)
class Job:
    """A run with everything in its hands, and where it stands."""

    plan: Plan
    model: Model
    net: nn.Module
    trainer: Trainer
    loader: Batches
    dataset: Dataset
    val: Dataset | None
    data: dict[str, str]  # digests of the splits
    device: str
    record: Record = field(init=False)  # given when the run has its folder
    notes: list[str] = field(default_factory=list)
    step: int = 0  # the next one
    scored: int = 0  # the step up to which the ends of epochs are done with
    best: float | None = None
    stale: int = 0  # evaluations since the best
    fell_back: bool = False  # it goes on from the state before the newest, which is damaged
    unsaved: DetrError | OSError | None = None  # why the last state could not be written

    @property
    def categories(self) -> Categories:
        return self.dataset.categories

    @property
    def average(self) -> Average | None:
        return self.trainer.average

    @property
    def answering(self) -> nn.Module:
        """The model to score and to keep: the average where there is one."""
        return self.net if self.average is None else self.average.model

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def steps(self) -> int:
        whole = self.plan.recipe.epochs * self.steps_per_epoch
        return whole if self.plan.steps is None else min(whole, self.plan.steps)

    @property
    def tired(self) -> bool:
        """Whether it has waited long enough for a better score."""
        return self.plan.patience is not None and self.stale >= self.plan.patience

    @property
    def given_up(self) -> str | None:
        """In words, that it was not worth going on, where that is so."""
        if not self.tired or self.step >= self.steps:
            return None
        return f"ended at step {self.step} of {self.steps}: no better AP in {self.stale} evaluations (--patience {self.plan.patience})"

    @property
    def over(self) -> bool:
        return self.step >= self.steps or self.tired

    @property
    def due(self) -> bool:
        """Whether an epoch has ended that was not scored and saved yet."""
        ended = self.step % self.steps_per_epoch == 0 or self.step == self.steps
        return ended and self.step > self.scored

    @property
    def done(self) -> bool:
        return self.over and not self.due


def assemble(plan: Plan, *, fresh: bool = True) -> Job:
    """Everything a run needs; nothing is written yet. A run that is not `fresh` gets its weights from its own state."""
    machine_notes = _prepare_machine(plan)
    device = distributed.own_device(plan.device)
    model = resolve(plan.model).configured(plan.config)
    dataset, val = _data(plan, model)
    torch.manual_seed(plan.seed)
    net = model.build(len(dataset.categories))
    check_patterns(net, plan.recipe, model.variant.recipes)
    notes = [
        *machine_notes,
        *_about_data(plan, dataset, val),
        *(_starts_from(net, plan, model, dataset) if fresh else ()),
    ]
    notes += _thrift(net, plan, model)
    net = net.to(device)
    trainer = _trainer(plan, model, net, dataset.categories, device)
    loader = _loader(plan, model, dataset)
    notes += _about_warmup(plan, len(loader)) if fresh else ()
    return Job(
        plan=plan,
        model=model,
        net=net,
        trainer=trainer,
        loader=loader,
        dataset=dataset,
        val=val,
        data={split.split: split.digest() for split in (dataset, val) if split is not None},
        device=device,
        notes=notes,
    )


def _prepare_machine(plan: Plan) -> list[str]:
    """Threads, determinism and memory of this process."""
    if plan.device == "cpu" and "allocator" in levers():
        keep_memory()
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no such form
        torch.use_deterministic_algorithms(True)
    if plan.device != "cpu":
        exact = "to the bit" if plan.deterministic else "to rounding; to the bit with --deterministic"
        return [f"the same numbers come out on this kind of device {exact}"]
    threads = choose_threads(plan.workers)
    each = f" in each of {distributed.world_size()} processes" if distributed.running() else ""
    notes = [
        f"{threads} thread{'s' if threads > 1 else ''}{each}: the same numbers come out with as many on this kind of machine"
    ]
    if plan.amp == "bf16" and (ratio := bf16_speed()) < 1:
        notes.append(
            f"bf16 has {ratio:.1f} times the speed of float32 on this CPU: --amp saves memory, not time"
        )
    return notes


def _data(plan: Plan, model: Model) -> tuple[Dataset, Dataset | None]:
    root = Path(plan.data_root) if plan.data_root else None
    masks = "masks" in model.family.needs(model.config)
    source = catalog.find(plan.data, root)
    skip: catalog.BadData = "skip" if plan.bad_data == "skip" else "error"
    dataset = catalog.resolve(plan.data, "train", root, masks=masks, bad_data=skip, headers=True)
    has_val = "val" in source.splits
    val = catalog.resolve(plan.data, "val", root, bad_data=skip, headers=True) if has_val else None
    if val is not None and plan.bad_data == "skip":
        val = _readable(val)
    for split in (dataset, val):
        if split is not None and len(split) == 0:
            raise DataError(
                f"{plan.data} {split.split} has no pictures", hint=f"look at it: {split.check_command}"
            )
    if val is not None:
        match_categories(dataset.categories, val.categories)  # an error before an epoch of work
        val.defects.merge(compared(val, dataset.categories))
    return dataset, val


def _readable(val: Dataset) -> Dataset:
    """Without pictures that are damaged behind their headers, as no other can take their place in an evaluation. To know them,
    all are decoded, once."""
    seen = distributed.from_main(pictures(val) if distributed.is_main() else Seen())
    readable = repair(val, seen.bad)
    for found in (val.defects, seen.defects):
        readable.defects.merge(found)
    return readable


def _about_data(plan: Plan, dataset: Dataset, val: Dataset | None) -> list[str]:
    """What the check before every training found."""
    notes = [note for split in (dataset, val) if split is not None for note in _defects(split)]
    if notes:
        notes.append(f"see all: {dataset.check_command}")
    if dataset.annotations.segments is not None and (boxed := without_outline(dataset.annotations)):
        objects = len(dataset.annotations.ids)
        notes.append(f"{boxed} of {objects} objects have no segmentation: their masks are their boxes")
    if val is not None and (same := shared_pictures(dataset, val)):
        which = "the pictures of val are" if same == len(val) else f"{same} of {len(val)} pictures of val are"
        notes.append(
            f"{which} those of train: scores say nothing of new pictures; see: {dataset.check_command}"
        )
    if val is None:
        notes.append("no validation split: nothing is scored, the last weights count as the best")
    return [*notes, *_about_size(plan, dataset)]


def _about_size(plan: Plan, dataset: Dataset) -> list[str]:
    """What is too small to learn from as it is."""
    notes, images, batch = [], len(dataset), plan.recipe.batch_size
    classes, counts = dataset.categories.names, dataset.defects.counts
    if images < batch:
        there = "1 training picture does" if images == 1 else f"{images} training pictures do"
        notes.append(f"{there} not fill a batch of {batch}: each step learns from all of them")
    if unseen := counts["empty-category"]:
        names = ", ".join(example.detail for example in dataset.defects.examples["empty-category"][:5])
        notes.append(
            f"{unseen} of {len(classes)} classes have no training objects: {names}{', …' if unseen > 5 else ''}"
        )
    return notes


def _about_warmup(plan: Plan, steps_per_epoch: int) -> list[str]:
    """A recipe for much data warms up for a number of steps that little data hardly has."""
    warmup, whole = plan.recipe.warmup_steps, plan.recipe.epochs * steps_per_epoch
    if warmup <= LONG * whole:
        return []
    reached = f", and the last has {whole / warmup:.0%} of the rate" if warmup > whole else ""
    return [
        f"the rate rises in the first {warmup} steps; the run has {whole}{reached}: "
        f"better --set recipe.warmup_steps={whole // 20}"
    ]


def _defects(dataset: Dataset) -> list[str]:
    found = dataset.defects
    kinds = [kind for severity in ("error", "warning") for kind in found.of(severity)]
    return [
        f"{dataset.split}: {found.counts[kind]} x {KINDS[kind].means} ({KINDS[kind].repair}), first: {found.examples[kind][0]}"
        for kind in kinds
    ]


def _starts_from(net: nn.Module, plan: Plan, model: Model, dataset: Dataset) -> list[str]:
    """Starting weights: a checkpoint if named, else ImageNet's for the backbone if the variant has some."""
    if plan.weights:
        report = warm_start(net, plan.weights, model, classes=dataset.categories)
        taken, *rest = told(report)
        return [f"weights from {plan.weights}: {taken}", *rest]
    for module in net.modules():
        if isinstance(module, Backbone) and module.config.pretrained:
            module.load_pretrained()
            return [f"backbone starts from {module.config.starts_from}", *_few(len(dataset), model)]
    return ["all weights start from nothing"]


def _few(images: int, model: Model) -> list[str]:
    """The rest of a detector is learned from nothing then, which takes many pictures."""
    if images >= FEW:
        return []
    known = next((weights.repo for weights in model.variant.weights), "a trained one")
    return [
        f"{images} training pictures are few for all but the backbone to start from nothing: better --weights {known}"
    ]


def _thrift(net: nn.Module, plan: Plan, model: Model) -> list[str]:
    notes = []
    if plan.freeze:
        notes.append(f"frozen: {freeze(net, model, plan.freeze):,} numbers ({' '.join(plan.freeze)})")
    if plan.checkpointing:
        notes.append(f"activations of {recompute(net, model)} layers are computed twice, not kept")
    if plan.compile:
        for module in net.modules():
            if isinstance(module, Backbone):
                module.compile(dynamic=True)
        notes.append("the backbone is compiled: the first steps are slow")
    return notes


def _trainer(plan: Plan, model: Model, net: nn.Module, categories: Categories, device: str) -> Trainer:
    learner = Learner(
        net,
        model.criterion(len(categories)),
        dtype=DTYPES[plan.amp],
        takes_targets=model.family.takes_targets,
    )
    return Trainer(
        net=net,
        learner=Shared.over_ranks(learner, device),
        optimizer=build_optimizer(net, plan.recipe),
        recipe=plan.recipe,
        device=device,
        seed=plan.seed,
        scaler=torch.amp.GradScaler(torch.device(device).type, enabled=plan.amp == "fp16"),
        average=None if plan.ema is None else Average(net, plan.ema),
        ways=Ways(amp=plan.amp),
    )


def _loader(plan: Plan, model: Model, dataset: Dataset) -> Batches:
    world_size = distributed.world_size()
    parts = plan.parts(world_size)
    return train_loader(
        dataset,
        training(plan.recipe.augment, model.variant.preprocess),
        batch_size=plan.recipe.batch_size // world_size // parts,
        parts=parts,
        seed=plan.seed,
        workers=plan.workers,
        rank=distributed.rank(),
        world_size=world_size,
        group_by_aspect=plan.group_by_aspect,
        skip_bad=plan.bad_data == "skip",
        pin_memory=plan.device.startswith("cuda"),
    )
