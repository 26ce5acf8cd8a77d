"""Running on several processes: started here (`on_ranks`), by torchrun, or by SLURM's srun (`joined`).

on_ranks(4, function, *args)    four processes of this machine; what rank 0 returns, or the error of the first that failed
with joined(): …                join the processes that were started beside this one, if any were
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented, but not declared
from torch.distributed.rendezvous import rendezvous

from detrcli.errors import DetrError, UsageError
from detrcli.meeting import PeerError, agreed_name

T = TypeVar("T")

_PASSED_ON = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]
GRACE = 20.0  # seconds that the others have to end by themselves once one has failed


@dataclass(slots=True)
class _Rank:
    """A process and the pipe that its answer comes through."""

    process: SpawnProcess
    answer: Connection
    said: Any = None  # what it returned, or its error
    answered: bool = False

    def listen(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError):  # died without a word
            self.said, self.answered = pickle.loads(self.answer.recv_bytes()), True
        self.answer.close()
        self.process.join()

    @property
    def failed(self) -> bool:
        return not self.answered or isinstance(self.said, BaseException)


def on_ranks(count: int, function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns on rank 0 of `count` processes that have joined each other.

    SIGINT, SIGTERM and SIGUSR1 are passed on to them. When one fails, the others get a while to end, and its error is raised here;
    where a signal has ended it, that is raised which ends this process with 128 and the signal's number.
    """
    ranks: list[_Rank] = []
    with _passing_on(ranks) as (ended_by, woken):
        _start(ranks, count, function, args, ended_by)
        _hear(ranks, woken)
    failed = [(number, rank) for number, rank in enumerate(ranks) if rank.failed]
    failed.sort(key=lambda pair: isinstance(pair[1].said, PeerError))  # the cause before those who noticed
    if failed:
        raise _failure(*failed[0], count, ended_by)
    result: T = ranks[0].said
    return result


def processes(devices: int) -> int:
    """How many share the work: so many that are to be started here, or those that torchrun or SLURM started."""
    there = started()
    if there > 1 and devices > 1:
        raise UsageError(
            f"--devices {devices} starts processes, and {there} were started already, by torchrun or SLURM",
            hint="leave --devices out: these share the work",
        )
    return max(there, devices)


def check(count: int, device: str | None) -> None:
    """An error where so many processes cannot each have a device of their own."""
    if device is not None and ":" in device:
        raise UsageError(
            f"{device} is one device, and {count} were asked for",
            hint="choose which with CUDA_VISIBLE_DEVICES, and leave --device out",
        )
    there = torch.cuda.device_count() if device in (None, "cuda") else 0
    if 0 < there < count:
        raise UsageError(
            f"{count} devices were asked for, this machine has {there}", hint=f"--devices {there}"
        )


def _start(
    ranks: list[_Rank], count: int, function: Callable[..., Any], args: tuple[Any, ...], ended_by: list[int]
) -> None:
    context = multiprocessing.get_context("spawn")
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        own = places | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        process = context.Process(target=_rank_main, args=(own, theirs, function, args))
        with _held():
            process.start()
        theirs.close()
        ranks.append(_Rank(process, ours))
        if (
            ended_by and process.pid is not None
        ):  # the signal came before this one was among those it is passed on to
            os.kill(process.pid, ended_by[-1])


def _hear(ranks: list[_Rank], woken: socket.socket) -> None:
    """Wait for every answer; for those still silent only a while once a rank has failed."""
    waiting = {rank.answer: rank for rank in ranks}
    deadline: float | None = None
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([*waiting, woken], left)
        if not ready:
            break
        for pipe in ready:
            if not isinstance(pipe, Connection):
                woken.recv(4096)
                continue
            rank = waiting.pop(pipe)
            rank.listen()
            if rank.failed and deadline is None:
                deadline = time.monotonic() + GRACE
    for rank in waiting.values():
        rank.said, rank.answered = PeerError("a process does not answer any more, and was ended"), True


def _failure(number: int, rank: _Rank, count: int, ended_by: list[int]) -> BaseException:
    if isinstance(rank.said, BaseException) and not (ended_by and isinstance(rank.said, PeerError)):
        return rank.said
    if ended_by:
        return KeyboardInterrupt() if ended_by[-1] == signal.SIGINT else SystemExit(128 + ended_by[-1])
    rank.process.join()
    return DetrError(
        f"process {number} of {count} ended early (exit code {rank.process.exitcode})",
        hint="run it with one device to see more; a killed process is most often short of memory",
    )


def _rank_main(
    places: Mapping[str, str], answer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The life of one rank. It leaves the terminal's group, so that ctrl-c reaches it once, through its parent."""
    os.environ.update(places)
    os.setpgrp()
    logging.getLogger("detrcli").addHandler(
        logging.NullHandler()
    )  # rank 0 is told what to show by its caller
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # it ends without a word; its parent knows why
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        said = _said(function, args)
        answer.send_bytes(pickle.dumps(said))  # whole: torch would share the memory of a process that ends
        answer.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that is left is to end


def _said(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What it returns, or its error."""
    try:
        with joined():
            return function(*args)
    except DetrError as error:
        return error
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """An unexpected error for the parent to raise: its traceback stays behind, so it goes along as a note."""
    import traceback

    copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("".join(traceback.format_exception(error)))
    return copy


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _held() -> Iterator[None]:
    """A process that is started inside begins with signals waiting, and lets them come in `_rank_main`: while it still loads,
    each would end it with a traceback."""
    resource_tracker.ensure_running()  # started inside, it would let them come
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)


@contextmanager
def _passing_on(ranks: list[_Rank]) -> Iterator[tuple[list[int], socket.socket]]:
    """SIGINT, SIGTERM and SIGUSR1 go to the ranks, which know how to stop and to save; those that end them into the list, too.
    What is still alive of them afterwards is killed. The socket becomes readable with every signal: where a thread of a library gets
    it, what this one waits for is not interrupted, and only here are handlers run."""
    ended_by: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        ending = number in (signal.SIGINT, signal.SIGTERM)
        sent = signal.SIGKILL if ending and ended_by else number  # a second one ends them at once
        if ending:
            ended_by.append(number)
        for rank in ranks:
            if rank.process.pid is not None and rank.process.is_alive():
                os.kill(rank.process.pid, sent)

    in_charge = threading.current_thread() is threading.main_thread()
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    before = {which: signal.signal(which, pass_on) for which in _PASSED_ON if in_charge}
    woken_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False) if in_charge else -1
    try:
        yield ended_by, woken
    finally:
        for rank in ranks:
            rank.process.kill()
        if in_charge:
            signal.set_wakeup_fd(woken_before)
        for which, handler in before.items():
            signal.signal(which, handler)
        woken.close()
        waker.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun or SLURM started beside this one, if any did.

    A process that does not answer for `DETR_TIMEOUT` seconds (600) ends the others.
    """
    for name, value in slurm(os.environ).items():
        os.environ.setdefault(name, value)
    if started() < 2 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_whole(os.environ, "LOCAL_RANK", 0) % torch.cuda.device_count())
    timeout = timedelta(seconds=_patience())
    try:
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        own = PrefixStore(agreed_name(store, rank, world_size, timeout.total_seconds()), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or _of_collective(error):
            raise _gone(error) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """The rank that torchrun or SLURM gave this process, before and after it is joined."""
    return _whole(slurm(os.environ) | dict(os.environ), "RANK", 0)


def started() -> int:
    """How many processes torchrun or SLURM started, this one among them."""
    variables = slurm(os.environ) | dict(os.environ)
    count = _whole(variables, "WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if count > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {count}, but {missing[0]} is not set",
            hint="torchrun sets both; alone, unset WORLD_SIZE: --devices starts processes of its own",
        )
    return count


def _whole(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(
            f"{name} needs a whole number (value given: {text!r})",
            hint=f"unset {name}, or start with torchrun",
        )
    return int(text)


def _patience() -> float:
    """Seconds of `DETR_TIMEOUT`."""
    text = os.environ.get("DETR_TIMEOUT") or "600"
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < 1e9:
            return seconds
    raise UsageError(f"DETR_TIMEOUT needs seconds (value given: {text!r})", hint="DETR_TIMEOUT=600")


def _of_collective(error: RuntimeError) -> bool:
    """gloo tells of a lost connection as a plain RuntimeError."""
    return bool(re.search(r"gloo|Connection (closed|reset)|Timed out waiting", str(error)))


def _gone(error: Exception) -> PeerError:
    return PeerError(
        f"another process has gone or does not answer: {str(error).splitlines()[0]}",
        hint="its own message says why; what was saved last stands: go on with --resume auto",
    )


def slurm(variables: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, from the variables of `srun`; nothing outside a job step of several tasks."""
    if "RANK" in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    job = int(variables.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": variables["SLURM_PROCID"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": variables.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": first_host(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(15000 + job % 20000),  # the same for all tasks of a job, another for another
    }


def first_host(nodes: str) -> str:
    """The first of SLURM's node list.

    >>> first_host("gpu[07-09,12],cpu1"), first_host("a,b"), first_host("n[1,3]-ib")
    ('gpu07', 'a', 'n1-ib')
    """
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise UsageError(f"SLURM's list of nodes is not understood: {nodes!r}", hint="set MASTER_ADDR")
    return "".join(part for part in found.groups() if part)
