"""Running one function on several processes of this machine, by torch's own launcher; what each returns comes back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from detrcli.errors import DetrError

T = TypeVar("T")


def on_ranks(count: int, function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns on rank 0 of `count` processes that have joined each other."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"detr-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        max_restarts=0,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report is not for users
    try:
        answers = elastic_launch(config, _guarded)(function, *args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise DetrError(
            f"process {rank} of {count} ended early (exit code {failure.exitcode})",
            hint="run it with one device to see more; a killed process is most often short of memory",
        ) from error
    errors = [answer for answer in answers.values() if isinstance(answer, DetrError)]
    if errors:
        raise errors[0]
    result: T = answers[0]
    return result


def _guarded(function: Callable[..., T], *args: Any) -> T | DetrError:
    """Errors of ours travel as values: the launcher would turn them into a report of its own."""
    try:
        with joined():
            return function(*args)
    except DetrError as error:
        return error


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun or SLURM started beside this one, if any did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
