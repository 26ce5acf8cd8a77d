"""Telling what went wrong in a step: which term of the loss, which pictures, how much memory, and what to type next."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from detrcli import distributed
from detrcli.errors import DetrError, NonFiniteError
from detrcli.train.machine import all_bytes, peak_bytes
from detrcli.types import Batch


@dataclass(frozen=True, slots=True)
class Ways:
    """What to type next, for the run at hand."""

    run: str = "RUN"  # its folder, as it is typed
    amp: str = "off"

    @property
    def onward(self) -> str:
        half = "" if self.amp == "off" else "; or in 32 bits: --amp off --allow-change amp"
        return (
            f"go on from there with a lower rate: --resume {self.run} --lr LOWER --allow-change lr{half}; where the same step "
            "fails again the weights are spoilt already: begin anew with a lower rate"
        )

    @property
    def anew(self) -> str:
        half = f"; or go on in 32 bits: --resume {self.run} --amp off --allow-change amp"
        return f"begin anew with a lower rate: --lr LOWER{'' if self.amp == 'off' else half}"

    def smaller(self, at_once: int, batch: int) -> str:
        """Where memory is short with so many pictures at once, of a batch."""
        less = ["--checkpointing", *(["--amp bf16"] if self.amp == "off" else []), "or smaller pictures"]
        ways = ", ".join(less)
        if at_once == 1:
            return f"one picture at a time is too much already: {ways}"
        half = next(n for n in range(at_once // 2, 0, -1) if batch % n == 0)
        return (
            f"the same batch in more parts: --device-batch {half} (to go on: --resume {self.run} --device-batch {half} "
            f"--allow-change device_batch), or let --auto-batch find it; or {ways}"
        )


class MemoryShortError(DetrError):
    """A step does not fit into the memory of its device."""

    kind = "out-of-memory"


def diagnosis(
    values: Mapping[str, float], norm: float, batches: Sequence[Batch], number: int, lr: float, ways: Ways
) -> NonFiniteError:
    """Every rank knows that the means are not finite, so all come here, and tell each other their pictures."""
    bad = [name for name, value in values.items() if name != "total" and not math.isfinite(value)]
    what = f"terms: {', '.join(bad)}" if bad else f"the gradient; the loss is {values['total']:.4g}"
    pictures = [i for ids in distributed.all_of([i for b in batches for i in b.image_ids]) for i in ids]
    return NonFiniteError(
        f"step {number} is not finite ({what}; lr {lr:.3g}; gradient norm {norm:.3g}; pictures: "
        f"{', '.join(map(str, pictures))}); the weights are as before it",
        hint=ways.onward,
    )


def of_evaluation(error: NonFiniteError, step: int, *, good: bool, ways: Ways) -> NonFiniteError:
    """The error of scoring weights; `good` where the state on the disk is of other ones, from before."""
    stands = "the state is of a step before" if good else "there is no state of a step before"
    return NonFiniteError(
        f"after {step} steps {error.message}; {stands}", hint=ways.onward if good else ways.anew
    )


@contextmanager
def explained(batches: Sequence[Batch], device: str, number: int, lr: float, ways: Ways) -> Iterator[None]:
    """Turns the many ways of running out of memory, and of having no deterministic form, into what can be done about it."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {number}: {error.message}; lr {lr:.3g}; the weights are as before it", hint=ways.onward
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "does not have a deterministic implementation" in str(error):
            raise DetrError(
                f"--deterministic: {str(error).split(',')[0]}",
                hint="leave it out (the same numbers to rounding), or train with --device cpu",
            ) from error
        if not is_short(error):
            raise
        shape = max((tuple(b.images.shape) for b in batches), key=math.prod)
        raise MemoryShortError(
            f"out of memory at step {number}: {shape[0]} pictures at once, padded to {shape[3]} x {shape[2]}{_peak(device)}",
            hint=ways.smaller(shape[0], sum(len(b.image_ids) for b in batches)),
        ) from error


def is_short(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"can't allocate memory|out of memory|not enough memory", str(error))
    )


def _peak(device: str) -> str:
    peak, there = peak_bytes(device) / 2**30, all_bytes(device) / 2**30
    return f"; peak {peak:.1f} of {there:.1f} GiB" if there else ""
