"""Pictures and targets in, loss out: the whole of what is differentiated, as one module that can be shared out over ranks."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from detrcli import distributed
from detrcli.types import Batch, Criterion

# torch 2.15 renamed it
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner(nn.Module):
    """A model with its criterion. The model computes in `dtype`, the criterion never in less than float32."""

    def __init__(
        self, net: nn.Module, criterion: Criterion, *, dtype: torch.dtype, takes_targets: bool
    ) -> None:
        super().__init__()
        self.net, self.criterion = net, criterion
        self.dtype, self.takes_targets = dtype, takes_targets

    def forward(self, batch: Batch, num_boxes: float) -> dict[str, Tensor]:
        """The loss to minimise as `total`, and its terms, all scalars."""
        half = self.dtype != torch.float32
        with torch.autocast(batch.images.device.type, self.dtype if half else None, enabled=half):
            extra = (batch.targets,) if self.takes_targets else ()
            output = self.net(batch.images, batch.mask, *extra)
        losses = self.criterion(output, batch.targets, num_boxes)
        return {"total": losses.total, **losses.terms}


@dataclass(slots=True)
class Shared:
    """A learner whose gradients are averaged over the ranks, where there are several."""

    learner: nn.Module
    warm: bool = False  # the first step of a static graph must not be left unsynchronised

    @staticmethod
    def over_ranks(learner: Learner, device: str) -> Shared:
        """Every parameter learns in every step (the conformance kit asks for it), so nothing is searched for unused ones."""
        if not distributed.running():
            return Shared(learner)
        normed = any(isinstance(module, _BatchNorm) for module in learner.modules())
        if normed and device.startswith("cuda"):
            learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner)  # type: ignore[no-untyped-call]
        options: dict[str, Any] = {"static_graph": True, _SYNC_BUFFERS: normed}
        return Shared(DistributedDataParallel(learner, **options))

    def __call__(self, batch: Batch, num_boxes: float) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.learner(batch, num_boxes)
        return losses

    def unsynchronised(self, last: bool) -> AbstractContextManager[None]:
        """Only the last part of a step needs the gradients of the others; averaging each would be right, too, and slower."""
        if last or not self.warm or not isinstance(self.learner, DistributedDataParallel):
            return nullcontext()
        skipping: AbstractContextManager[None] = self.learner.no_sync()
        return skipping
