"""A step asks the device for nothing but the costs to match and, once, the numbers to show: each question waits for all before it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detrcli.plugins import models
from detrcli.train.job import assemble
from detrcli.train.plan import make_plan

# what makes a GPU's host wait: a number, or a size that depends on values
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
MEANT = {"d2etr/tiny": {"_unique2"}}  # which classes a picture has, of which its tokens are labelled


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


@pytest.mark.parametrize("name", sorted(m.name for m in models() if m.variant.name == "tiny"))
def test_a_step_asks_for_no_number_on_the_way(ask, name):
    job = assemble(make_plan(ask(model=name)))
    job.net.train()
    (parts, *_) = job.loader.steps(0)
    with Questions() as noticed:
        job.trainer.step(parts, 0, 0, 1.0)
    assert noticed.asked.keys() == MEANT.get(name, set())
