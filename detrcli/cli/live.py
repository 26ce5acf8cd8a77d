"""A training as people see it: a picture that moves on a terminal, a line now and then elsewhere; the same facts in both."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detrcli.cli import console

if TYPE_CHECKING:
    from detrcli.evaluate.run import EvalResult
    from detrcli.train.job import Job
    from detrcli.train.loop import Step

WINDOW = 50  # steps that speed and losses are means of
EVERY = 10.0  # seconds between two lines where nothing can be drawn


@dataclass(slots=True)
class Facts:
    """Where a run stands."""

    steps: int
    epochs: int
    steps_per_epoch: int
    done: int
    device: str
    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=WINDOW))
    last_ap: float | None = None
    best_ap: float | None = None

    @property
    def epoch(self) -> int:
        return min(self.epochs, 1 + max(0, self.done - 1) // self.steps_per_epoch)

    @property
    def losses(self) -> dict[str, float]:
        """The loss and its terms; those of earlier layers are in the loss and not shown."""
        if not self.recent:
            return {}
        shown = [name for name in self.recent[-1].terms if not name.rpartition("_")[2].isdigit()]
        terms = {name: _mean(s.terms.get(name, 0.0) for s in self.recent) for name in shown[:4]}
        return {"loss": _mean(s.loss for s in self.recent), **terms}

    @property
    def rate(self) -> float:
        """Steps a second."""
        seconds = sum(s.seconds for s in self.recent)
        return len(self.recent) / seconds if seconds else 0.0

    @property
    def waiting(self) -> float:
        """The share of the time in which the device has no data."""
        seconds = sum(s.seconds for s in self.recent)
        return sum(s.waited for s in self.recent) / seconds if seconds else 0.0

    @property
    def left(self) -> str:
        """Until the last step, evaluations left out."""
        return _clock((self.steps - self.done) / self.rate) if self.rate else "?"

    def pace(self) -> list[str]:
        lr = [f"lr {self.recent[-1].lr:.2g}"] if self.recent else []
        scores = [] if self.last_ap is None else [f"AP {self.last_ap:.3f} (best {self.best_ap or 0:.3f})"]
        return [
            *lr, f"{self.rate:.2f} it/s", f"data {self.waiting:.0%}", f"{memory(self.device):.1f} GB", *scores
        ]  # fmt: skip

    def line(self) -> str:
        """Everything in one line."""
        loss, *terms = [f"{name} {value:.3f}" for name, value in self.losses.items()]
        in_short = f" ({', '.join(terms)})" if terms else ""
        where = f"step {self.done}/{self.steps} epoch {self.epoch}/{self.epochs}"
        return f"{where} {loss}{in_short} {' '.join(self.pace())} left {self.left}"


def memory(device: str) -> float:
    """Gigabytes: the most that was held on the GPU, or what this process holds now."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError, IndexError):
        return _peak()


def _peak() -> float:
    """The most that this process ever held; not on Windows."""
    try:
        import resource
    except ImportError:
        return 0.0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Screen:
    """The watcher of `detr train`."""

    def __init__(self, describe: Callable[[Job], list[str]]) -> None:
        self._describe = describe
        self._settings = console.settings  # with several devices it travels to the first process
        self._facts: Facts | None = None
        self._view: _Moving | _Lines = _Lines()

    def begins(self, job: Job) -> None:
        if console.settings is not self._settings:
            console.settings = self._settings
            console.listen()
        for line in self._describe(job):
            console.note(line)
        self._facts = Facts(job.steps, job.plan.recipe.epochs, job.steps_per_epoch, job.step, job.plan.device)
        self._facts.best_ap = self._facts.last_ap = job.best
        self._view = _Moving() if console.can_draw() else _Lines()
        self._view.begin(self._facts)

    def step(self, step: Step) -> None:
        assert self._facts is not None
        self._facts.done = step.number + 1
        self._facts.recent.append(step)
        self._view.show(self._facts)

    def evaluating(self, images: int) -> Callable[[int], None]:
        return self._view.evaluating(images)

    def evaluated(self, step: int, result: EvalResult, best: bool) -> None:
        assert self._facts is not None
        m = result.metrics
        self._facts.last_ap = m["ap"]
        self._facts.best_ap = m["ap"] if best else self._facts.best_ap
        console.note(f"step {step}: AP {m['ap']:.3f}  AP50 {m['ap50']:.3f}{'  (best)' if best else ''}")
        self._view.show(self._facts)

    def ended(self) -> None:
        self._view.end()


class _Lines:
    """A whole line every ten seconds, and none of what moves."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def begin(self, facts: Facts) -> None: ...

    def show(self, facts: Facts) -> None:
        if facts.recent and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            console.note(facts.line())

    def evaluating(self, images: int) -> Callable[[int], None]:
        done, begun = 0, time.monotonic()

        def advance(by: int) -> None:
            nonlocal done, begun
            done += by
            if time.monotonic() - begun >= EVERY:
                begun = time.monotonic()
                console.note(f"evaluating {done}/{images}")

        return advance

    def end(self) -> None: ...


class _Moving:
    """Three lines at the foot of the terminal that are drawn anew a few times a second."""

    def __init__(self) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._live = Live(console=console.stderr(), transient=True, refresh_per_second=4)
        self._task: Any = None

    def begin(self, facts: Facts) -> None:
        self._task = self._bar.add_task("training", total=facts.steps, text="")
        self._live.start()
        self.show(facts)

    def show(self, facts: Facts) -> None:
        text = f"{facts.done}/{facts.steps} · epoch {facts.epoch}/{facts.epochs} · left {facts.left}"
        self._bar.update(
            self._task, completed=facts.done, total=facts.steps, description="training", text=text
        )
        self._live.update(self._drawn(facts.losses, facts.pace()))

    def _drawn(self, losses: Mapping[str, float], pace: list[str]) -> Any:
        from rich.console import Group
        from rich.text import Text

        first = Text("  ")
        for name, value in losses.items():
            first.append(f"{name} ", style="dim").append(
                f"{value:.3f}   ", style="bold" if name == "loss" else ""
            )
        lines = [Text(f"  {' · '.join(pace)}", style="dim", no_wrap=True)]
        first.no_wrap = True
        return Group(self._bar, first, *lines)

    def evaluating(self, images: int) -> Callable[[int], None]:
        done = 0

        def advance(by: int) -> None:
            nonlocal done
            done += by
            self._bar.update(
                self._task, completed=done, total=images, description="evaluating", text=f"{done}/{images}"
            )

        return advance

    def end(self) -> None:
        self._live.stop()
