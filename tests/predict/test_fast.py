"""A model made fast for inference answers as it did before, only faster."""

from __future__ import annotations

import pytest
import torch

from detrcli.errors import UsageError
from detrcli.nn.inference import choose_device, infer
from detrcli.nn.layers import FrozenBatchNorm2d
from detrcli.nn.speed import fastest
from detrcli.plugins import resolve


@pytest.mark.parametrize("dilated", [False, True])
def test_norms_are_folded_into_convolutions_without_changing_the_answer(dilated):
    model = resolve("detr/r50-dc5" if dilated else "detr/r50")
    torch.manual_seed(0)
    network = model.build(3).double().eval()
    norms = [m for m in network.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 53
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.bias.normal_(0, 0.1)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 70:] = True
    before = infer(network, images, mask)
    after = infer(fast := fastest(network), images, mask)
    assert not [m for m in fast.modules() if isinstance(m, FrozenBatchNorm2d)]
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(after.boxes, before.boxes, rtol=0, atol=1e-9)


def test_a_device_that_is_not_there_is_refused_and_the_environment_chooses(monkeypatch):
    for name in ("cuda:97", "nonsense"):
        with pytest.raises(UsageError, match=name):
            choose_device(name)
    monkeypatch.setenv("DETR_DEVICE", "cpu")
    assert choose_device() == torch.device("cpu")
    monkeypatch.setenv("DETR_DEVICE", "")
    assert choose_device() == choose_device("auto")
