"""Lite-Deformable DETR against a composite of the official codes: Deformable DETR's model around Lite DETR's encoder.

Queries come in the order of their proposals' scores, which float32 does not fix, so both sides are sorted by box or token.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from detrcli.plugins.registry import resolve
from detrcli.types import Output
from detrcli.weights.keymap import apply

from .golden import Golden, golden, proposing


@cache
def run() -> tuple[Golden, Output, Tensor]:
    """The reference, our answer, and our memory."""
    torch.set_num_threads(1)
    declared, reference = resolve("lite_deformable/h3l1-2x3"), golden("lite_detr", "lite_deformable_h3l1_2x3")
    model = declared.build().eval()
    official = declared.family.key_maps["official"](declared.config)
    model.load_state_dict(apply(official, reference.official_state_dict()).tensors)
    memories: list[Tensor] = []
    model.get_submodule("encoder").register_forward_hook(lambda *args: memories.append(args[2]))
    with torch.no_grad():
        output = proposing(model)(*reference.images)
    return reference, output, memories[0]


def ours() -> Tensor:
    """The tokens (B, Q) of our queries: the best by objectness, best first."""
    proposals = run()[1].proposals
    assert proposals is not None
    return proposals.logits[..., 0].topk(300, dim=1).indices


def by_token(values: Tensor, tokens: Tensor) -> Tensor:
    """values (..., B, Q, ·) in the order of their tokens (B, Q)."""
    order = tokens.argsort(dim=1)
    return torch.stack([values[..., i, order[i], :] for i in range(len(order))], -3)


def test_the_same_tokens_are_proposed() -> None:
    reference, output, _ = run()
    assert torch.equal(ours().sort(1).values, reference.tensors["topk_indices"].long().sort(1).values)
    assert output.proposals is not None
    scores = output.proposals.logits[..., 0].topk(300, dim=1).values
    torch.testing.assert_close(scores, reference.tensors["topk_scores"], atol=1e-4, rtol=0)


def test_the_memory_equals_the_composite() -> None:
    reference, _, memory = run()
    torch.testing.assert_close(memory[:, ::29, ::8], reference.tensors["memory_sample"], atol=1e-4, rtol=0)


def test_answers_equal_the_composite() -> None:
    reference, output, _ = run()
    theirs = reference.tensors["topk_indices"].long()
    for name, found, atol in (("pred_logits", output.logits, 2e-4), ("pred_boxes", output.boxes, 2e-5)):
        wanted = by_token(reference.tensors[name], theirs)
        torch.testing.assert_close(by_token(found, ours()), wanted, atol=atol, rtol=0)
    aux = torch.stack([layer.boxes for layer in output.aux])
    wanted = by_token(reference.tensors["aux_boxes"], theirs)
    torch.testing.assert_close(by_token(aux, ours()), wanted, atol=3e-5, rtol=0)
