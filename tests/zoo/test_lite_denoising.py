"""The queries of contrastive denoising against the official builder, given its draws; and what no draw may break."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrcli.boxes import cxcywh_to_xyxy
from detrcli.types import Target
from detrcli_lite_detr.criterion import positives
from detrcli_lite_detr.denoising import DenoisingQueries, Draws, count_groups, who_sees_whom

from .golden import golden, seeded

REFERENCE = golden("lite_detr", "dn_queries")


@pytest.mark.parametrize("case", REFERENCE.spec["cases"])
def test_queries_equal_the_official_builder(case: str) -> None:
    spec = REFERENCE.spec["cases"][case]
    t = {n.removeprefix(f"{case}."): x for n, x in REFERENCE.tensors.items() if n.startswith(f"{case}.")}
    targets = [Target(t[f"labels.{i}"], t[f"boxes.{i}"]) for i in range(len(spec["boxes_per_image"]))]
    module = DenoisingQueries(
        91,
        32,
        spec["dn_number"],
        label_noise=spec["label_noise_ratio"],
        box_noise=spec["box_noise_scale"],
    )
    table = seeded.tensor("label_enc.weight", (92, 32), "dn-fn")
    module.label_enc.weight.data = torch.from_numpy(np.asarray(table))
    most = max(spec["boxes_per_image"])
    groups = count_groups(spec["dn_number"], most)
    assert groups == spec["groups"]
    noisy = module(targets, stored(t, 2 * groups))
    assert noisy.boxes.shape[1] == spec["pad_size"]
    assert torch.equal(noisy.content[..., ::4], t["query_label"])
    torch.testing.assert_close(noisy.boxes, t["query_box_unsigmoid"], atol=1e-6, rtol=1e-6)
    hidden = who_sees_whom(spec["pad_size"], 2 * most, REFERENCE.spec["num_queries"], torch.device("cpu"))
    assert torch.equal(hidden, t["attn_mask"].bool())


def stored(t: dict[str, Tensor], rows: int) -> Draws:
    def draw(name: str) -> Tensor:
        return t[f"draw.{name}"].unflatten(0, (rows, len(t[f"draw.{name}"]) // rows))

    return Draws(draw("label_flip_u"), draw("label_new"), draw("box_sign01").float() * 2 - 1, draw("box_u"))


def objects(counts: list[int]) -> list[Target]:
    generator = torch.Generator().manual_seed(sum(counts))
    return [
        Target(
            torch.randint(5, (count,), generator=generator),
            torch.rand(count, 4, generator=generator) * 0.3 + 0.3,
        )
        for count in counts
    ]


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    setting=st.integers(1, 120),
    noise=st.floats(0, 1),
)
def test_positives_stay_nearer_to_their_object_than_negatives(
    counts: list[int], setting: int, noise: float
) -> None:
    torch.manual_seed(0)
    targets = objects(counts)
    noisy = DenoisingQueries(5, 8, setting, label_noise=0.0, box_noise=noise)(targets)
    assert torch.isfinite(noisy.boxes).all()
    groups = count_groups(setting, max(counts))
    matches = positives(targets, 1, groups, max(counts))
    assert len(matches.target) == groups * sum(counts)
    _, picture, query = matches.places
    boxes = torch.cat([t.boxes for t in targets])[matches.target]
    for shift, limit in ((0, 1.0), (max(counts), 2.0)):
        corners = cxcywh_to_xyxy(noisy.boxes[picture, query + shift].sigmoid())
        moved = (corners - cxcywh_to_xyxy(boxes)).abs() / (boxes[:, 2:] / 2).repeat(1, 2)
        assert (moved <= limit * noise + 0.02).all()


def test_no_objects_at_all_make_no_queries_but_still_a_gradient() -> None:
    module = DenoisingQueries(5, 8, 100, label_noise=0.5, box_noise=1.0)
    noisy = module(objects([0, 0]))
    assert noisy.content.shape == (2, 0, 8)
    noisy.content.sum().backward()
    assert module.label_enc.weight.grad is not None, "distributed training waits for every parameter"


def test_a_group_sees_itself_and_the_models_queries_which_see_no_group() -> None:
    hidden = who_sees_whom(8, 4, 3, torch.device("cpu"))
    assert not hidden[:4, :4].any()
    assert hidden[:4, 4:8].all()
    assert not hidden[:8, 8:].any()
    assert hidden[8:, :8].all()
