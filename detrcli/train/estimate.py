"""Before a run: what it would do, take and need, from a few real steps; and the largest batch that fits on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from detrcli import distributed
from detrcli.errors import UsageError
from detrcli.train import state
from detrcli.train.guard import MemoryShortError
from detrcli.train.job import Job, assemble
from detrcli.train.machine import peak_bytes
from detrcli.train.plan import Plan
from detrcli.types import Batch, Target

TRIED = 3  # steps, after one to warm up


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A plan, tried. Times are of training alone, without evaluations."""

    plan: Plan
    devices: int
    notes: tuple[str, ...]
    images: int
    objects: int
    classes: int
    val_images: int
    parameters: int
    learned: int  # of the parameters
    steps: int
    steps_per_epoch: int
    at_once: int  # pictures on one device
    parts: int
    step_seconds: float
    waited_seconds: float  # of these, for data
    peak_bytes: int  # of a device; on a CPU of the process
    done: int = 0  # of the steps

    @property
    def seconds(self) -> float:
        return max(0, self.steps - self.done) * self.step_seconds


def estimate(plan: Plan, devices: int = 1, resumed: Path | None = None) -> Estimate:
    """Take a few steps of a device's share of each batch, as a new run or as one that goes on. Nothing is written."""
    parts = plan.parts(devices)
    done = 0 if resumed is None else state.read(resumed)["step"]
    share = replace(plan, recipe=replace(plan.recipe, batch_size=plan.recipe.batch_size // devices))
    job = assemble(share, fresh=resumed is None)
    steps_per_epoch = max(1, len(job.dataset) // plan.recipe.batch_size)
    whole = plan.recipe.epochs * steps_per_epoch
    seconds, waited = _timed(job)
    return Estimate(
        plan=plan,
        devices=devices,
        notes=tuple(job.notes),
        images=len(job.dataset),
        objects=len(job.dataset.annotations.ids),
        classes=len(job.categories),
        val_images=0 if job.val is None else len(job.val),
        parameters=sum(p.numel() for p in job.net.parameters()),
        learned=sum(p.numel() for p in job.net.parameters() if p.requires_grad),
        steps=whole if plan.steps is None else min(whole, plan.steps),
        steps_per_epoch=steps_per_epoch,
        at_once=job.loader.sampler.batch_size,
        parts=parts,
        step_seconds=seconds,
        waited_seconds=waited,
        peak_bytes=peak_bytes(job.device),
        done=done,
    )


def _timed(job: Job) -> tuple[float, float]:
    """Seconds of a step, and of these of waiting for its data: the medians of a few."""
    job.net.train()
    tried = []
    asked = time.perf_counter()
    epochs = (parts for epoch in range(TRIED + 1) for parts in job.loader.steps(epoch))
    for number, parts in enumerate(islice(epochs, TRIED + 1)):
        tried.append(job.trainer.step(parts, number, 0, 1.0, time.perf_counter() - asked))
        asked = time.perf_counter()
    _, *timed = tried
    return float(np.median([s.seconds for s in timed])), float(np.median([s.waited for s in timed]))


def with_largest_batch(plan: Plan, devices: int) -> Plan:
    """The plan with the largest `device_batch` whose worst step fits on a device: rank 0 tries on its own, the others wait."""
    _check_device(plan.device)
    plan.parts(devices)  # a batch that cannot be shared is told before anything is tried
    share = replace(plan.recipe, batch_size=plan.recipe.batch_size // devices)
    alone = replace(plan, device=distributed.own_device(plan.device), device_batch=None, recipe=share)
    found = 0
    if distributed.is_main():
        with distributed.apart():
            found = _largest_on_its_device(alone)
        _free(alone.device)
    return replace(plan, device_batch=distributed.from_main(found))


def _check_device(device: str) -> None:
    if device == "cpu":
        raise UsageError(
            "--auto-batch fills the memory of a GPU; on the CPU a step that does not fit ends the process",
            hint="choose --device-batch, and see what it needs: --dry-run",
        )


def _largest_on_its_device(plan: Plan) -> int:
    job = assemble(plan, fresh=False)
    job.net.train()

    def attempt(size: int) -> None:
        for number in range(2):  # the second has the optimiser's memory, too
            job.trainer.step([worst_batch(job, size)], number, 0, 1.0)

    return largest(plan.recipe.batch_size, attempt)


def _free(device: str) -> None:
    """For the training, which is to find the device as it was, and to be told its own peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def largest(share: int, attempt: Callable[[int], None]) -> int:
    """The largest divisor of a device's share of the batch that can be attempted without running out of memory."""
    for size in (n for n in range(share, 0, -1) if share % n == 0):
        try:
            attempt(size)
            return size
        except MemoryShortError:
            if size == 1:
                raise
        torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of the attempt
    raise AssertionError("1 divides everything")


def worst_batch(job: Job, size: int) -> Batch:
    """As large as a batch can become: a wide and a tall picture side by side, each with the most objects of all."""
    preprocess, annotations = job.model.variant.preprocess, job.dataset.annotations
    short = preprocess.short_side if job.plan.group_by_aspect else preprocess.long_side
    most = int(np.diff(annotations.offsets).max(initial=0))
    target = Target(torch.zeros(most, dtype=torch.int64), torch.full((most, 4), 0.5))
    images = torch.zeros(size, 3, short, preprocess.long_side).contiguous(memory_format=torch.channels_last)
    return Batch(
        images,
        torch.zeros(size, *images.shape[-2:], dtype=torch.bool),
        (target,) * size,
        (0,) * size,
        torch.tensor([[short, preprocess.long_side]] * size),
    )
