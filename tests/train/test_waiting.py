"""A step asks the device for nothing but the costs to match and, once, the numbers to show: each question waits for all before it.

There need not be a GPU: tensors that only say they are on one refuse what depends on values, and show what crosses over.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detrcli.nn import matcher
from detrcli.plugins import models
from detrcli.train.job import assemble
from detrcli.train.plan import make_plan

# what makes a GPU's host wait: a number, or a size that depends on values
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}


class Questions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in ASKING or by_mask:
            self.asked[name] += 1
        return function(*args, **(kwargs or {}))


def test_questions_are_noticed():
    x = torch.arange(3.0)
    with Questions() as noticed:
        x.sum().item()
        x[x > 1]
    assert noticed.asked.keys() == {"_local_scalar_dense", "index"}


TINY = sorted(m.name for m in models() if m.variant.name == "tiny")


@pytest.mark.parametrize("name", TINY)
def test_a_step_asks_for_no_number_on_the_way(ask, name):
    job = assemble(make_plan(ask(model=name)))
    job.net.train()
    (parts, *_) = job.loader.steps(0)
    with Questions() as noticed:
        job.trainer.step(parts, 0, 0, 1.0)
    assert not noticed.asked


class Crossings(TorchDispatchMode):
    """Copies between host and device that one of them waits for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = args[1 if name == "copy_" else 0].device.type, out.device.type
            unwaited = target == "cuda" and kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source != target and not unwaited:
                self.seen.append((source, target))
        return out


def on_fake_gpu(module):
    """The module with its tensors said to be on a GPU."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    own[name] = (
                        torch.nn.Parameter(fake, tensor.requires_grad) if own is part._parameters else fake
                    )
    return module


def test_crossings_are_noticed():
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as noticed:
        x = torch.ones(3).to("cuda", non_blocking=True)
        assert noticed.seen == []
        torch.tensor([1, 2], device="cuda")
        x.cpu()
        with pytest.raises(DynamicOutputShapeException):
            x.nonzero()
    assert noticed.seen == [("cpu", "cuda"), ("cuda", "cpu")]


@pytest.mark.parametrize("name", TINY)
def test_forward_and_loss_cross_over_once(ask, name, monkeypatch):
    """Everything that a model answers is matched with one copy to the host."""
    monkeypatch.setattr(matcher, "_on_host", lambda values: (values.cpu(), np.zeros(values.shape))[1])
    job = assemble(make_plan(ask(model=name)))
    job.net.train()
    ((part, *_), *_) = job.loader.steps(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner = on_fake_gpu(job.trainer.learner.learner)
        with Crossings() as noticed:
            total = learner(part.to("cuda"), 4.0)["total"]
    assert total.device.type == "cuda"
    assert noticed.seen == [("cuda", "cpu")]
