"""Laws of Deformable DETR, on its tiny variant and on small pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detrcli.boxes import cxcywh_to_xyxy, iou
from detrcli.errors import CheckpointError, UsageError
from detrcli.nn import matcher
from detrcli.plugins.registry import Model, resolve
from detrcli.train.optim import parameter_groups
from detrcli.types import Output, Target
from detrcli.weights.keymap import revert
from detrcli.weights.load import load_state
from detrcli_deformable_detr.attention import ring_offsets
from detrcli_deformable_detr.config import DeformableDetrConfig
from detrcli_deformable_detr.decoder import move_boxes
from detrcli_deformable_detr.model import DeformableDetr

TINY = resolve("deformable_detr/tiny")
KINDS: dict[str, dict[str, Any]] = {
    "two-stage": {},
    "refine": {"two_stage": False},
    "plain": {"two_stage": False, "refine": False},
    "extra levels": {"levels": 4},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def variant(kind: str = "two-stage", **changes: Any) -> Model:
    return TINY.configured(replace(TINY.config, **KINDS[kind], **changes))


def model(kind: str = "two-stage", **changes: Any) -> DeformableDetr:
    """A model whose answers differ: fresh heads and offsets are constant."""
    torch.manual_seed(0)
    module = variant(kind, **changes).build(3).eval()
    assert isinstance(module, DeformableDetr)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("backbone"):
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return module


def pictures(*sizes: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random pictures of the given heights and widths, padded to one size."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width)
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return images, mask


def close(a: Output, b: Output, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a.logits, b.logits, atol=atol, rtol=0)
    torch.testing.assert_close(a.boxes, b.boxes, atol=atol, rtol=0)


# --- padding, batches, determinism


@each_kind
@torch.no_grad()
def test_what_stands_in_the_padding_of_the_tokens_is_never_read(kind: str) -> None:
    module = model(kind)
    images, mask = pictures((64, 96), (48, 61))
    tokens = module.levels(module.backbone(images, mask))
    assert tokens.mask is not None
    assert tokens.mask[1].any()
    assert not tokens.mask[0].any()
    noise = torch.where(tokens.mask[..., None], torch.randn_like(tokens.x) * 100, tokens.x)
    close(module.answer(tokens), module.answer(tokens._replace(x=noise)), atol=1e-4)


@each_kind
@torch.no_grad()
def test_a_picture_is_answered_alike_alone_and_in_a_batch(kind: str) -> None:
    module = model(kind)
    images, mask = pictures((64, 96), (48, 61), (64, 33))
    together = module(images, mask)
    for i in range(3):
        alone = module(images[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together.boxes[i], alone.boxes[0], atol=1e-4, rtol=0)


@each_kind
@torch.no_grad()
def test_the_same_pictures_get_the_same_answer_to_the_bit(kind: str) -> None:
    module, (images, mask) = model(kind), pictures((64, 96), (48, 61))
    close(module(images, mask), module(images, mask), atol=0)


@pytest.mark.parametrize("kind", ["two-stage", "plain"])
def test_the_whole_forward_compiles_without_a_graph_break(kind: str) -> None:
    module, (images, mask) = model(kind), pictures((64, 96), (48, 61))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(module(images, mask), compiled(images, mask), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["refine", "plain"])
def test_sixteen_bits_stay_near_float32(kind: str) -> None:
    """Row by row, so without proposals, whose order may change."""
    module, (images, mask) = model(kind), pictures((64, 96), (48, 61))
    exact = module(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(images, mask)
    assert half.boxes.dtype == torch.float32, "geometry stays exact"
    assert (half.boxes - exact.boxes).abs().mean() < 0.01
    assert (half.logits - exact.logits).abs().mean() < 0.03 * exact.logits.std()


def test_half_precision_trains() -> None:
    module, (images, mask) = model().train(), pictures((64, 64), (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        output = module(images, mask)
    losses = criterion()(output, [objects(2), objects(0)])
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


# --- parts


def test_attention_starts_as_rings_of_one_to_four_pixels() -> None:
    ring = ring_offsets(8, 4)
    assert torch.allclose(ring.abs().amax(-1), torch.arange(1.0, 5).expand(8, 4))
    assert torch.allclose(ring[0, 0], torch.tensor([1.0, 0.0]), atol=1e-6)
    assert torch.allclose(ring[1, 0], torch.tensor([1.0, 1.0]), atol=1e-6)
    attention = model().encoder.layers[0].self_attn
    attention.reset_parameters()
    assert attention.sampling_offsets.bias.view(4, 2, 4, 2).std(1).max() == 0, "the same in every level"
    assert attention.attention_weights.weight.count_nonzero() == 0


def test_fresh_heads_answer_with_their_reference_and_a_low_score() -> None:
    torch.manual_seed(0)
    for kind, size in (("two-stage", None), ("plain", -2.0)):
        module = variant(kind).build(3).eval()
        with torch.no_grad():
            output = module(*pictures((64, 64)))
        assert output.logits.sigmoid().mean() < 0.05
        if size is not None:
            torch.testing.assert_close(output.boxes[..., 2:], torch.tensor(size).sigmoid().expand(1, 10, 2))


def test_boxes_move_from_points_and_from_boxes() -> None:
    still = torch.zeros(1, 4)
    box = torch.tensor([[0.3, 0.6, 0.2, 0.1]])
    torch.testing.assert_close(move_boxes(still, box), box)
    torch.testing.assert_close(move_boxes(still, box[:, :2]), torch.tensor([[0.3, 0.6, 0.5, 0.5]]))
    assert move_boxes(still.bfloat16(), box).dtype == torch.float32


@torch.no_grad()
def test_each_layer_moves_the_boxes_of_the_one_before() -> None:
    module = model("refine", decoder_layers=3)
    for head in module.box_heads[1:]:
        for parameter in head.parameters():
            parameter.zero_()
    output = module(*pictures((64, 64)))
    first, second = output.aux
    torch.testing.assert_close(second.boxes, first.boxes)
    torch.testing.assert_close(output.boxes, first.boxes)


def test_no_gradient_reaches_an_earlier_layers_box_through_refinement() -> None:
    module = model("refine")
    output = module(*pictures((64, 64)))
    last = module.box_heads[-1].layers[-1].bias
    first = module.box_heads[0].layers[-1].bias
    gradients = torch.autograd.grad(output.boxes.sum(), (last, first), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


@torch.no_grad()
def test_padding_and_borders_are_never_proposed_unless_asked() -> None:
    images, mask = pictures((64, 96), (40, 41))
    for masked in (True, False):
        module = model(mask_proposals=masked)
        module.queries.class_head.weight.zero_()
        # without the mask, unusable tokens win: all of them have the score of a zero memory
        module.queries.class_head.weight[0] = module.queries.enc_output_norm(module.queries.enc_output.bias)
        reference, proposals = proposed(module, images, mask)
        assert (proposals.boxes == 1).all(-1).any()
        assert ((reference == 1).all(-1).any()) == (not masked)


@torch.no_grad()
def test_prediction_chooses_the_queries_that_training_chooses() -> None:
    module = model()
    images, mask = pictures((64, 96), (40, 41))
    whole, proposals = proposed(module, images, mask)
    tokens = module.levels(module.backbone(images, mask))
    queries, nothing = module.queries.eval()(module.encoder(tokens), tokens)
    assert nothing is None
    assert proposals.boxes.shape[1] > whole.shape[1]
    torch.testing.assert_close(queries.reference, whole, atol=1e-6, rtol=0)


def proposed(module: DeformableDetr, images: Tensor, mask: Tensor) -> tuple[Tensor, Output]:
    tokens = module.levels(module.backbone(images, mask))
    module.queries.train()
    queries, proposals = module.queries(module.encoder(tokens), tokens)
    assert proposals is not None
    return queries.reference, proposals


# --- training


def criterion() -> Any:
    return TINY.family.build_criterion(TINY.config, 3)


def objects(count: int) -> Target:
    generator = torch.Generator().manual_seed(count)
    boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
    return Target(torch.arange(count) % 3, boxes)


@each_kind
def test_every_trainable_parameter_gets_a_gradient(kind: str) -> None:
    module, (images, mask) = model(kind).train(), pictures((64, 96), (48, 61))
    criterion()(module(images, mask), [objects(2), objects(3)]).total.backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (90, 1)])
def test_no_objects_or_more_than_queries_train(counts: tuple[int, ...]) -> None:
    module, (images, mask) = model().train(), pictures((64, 64), (64, 64))
    losses = criterion()(module(images, mask), [objects(n) for n in counts])
    losses.total.backward()
    assert losses.total.isfinite()
    assert {"ce", "bbox_0", "giou_enc", "ce_enc"} <= losses.terms.keys()


def test_more_objects_than_queries_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    matcher._note_more_objects.cache_clear()
    module, (images, mask) = model("plain"), pictures((64, 64))
    for _ in range(2):
        criterion()(module(images, mask), [objects(12)])
    (note,) = caplog.messages
    assert "10 queries" in note
    assert "model.num_queries" in note


def test_one_picture_is_learnt_by_heart() -> None:
    torch.manual_seed(0)
    module, (images, mask) = TINY.build(3).train(), pictures((64, 64))
    target = Target(torch.tensor([0, 2]), torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.25]]))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        criterion()(module(images, mask), [target]).total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    with torch.no_grad():
        found = TINY.postprocess(module.eval()(images, mask), torch.tensor([[1, 1]]))[0]
    assert set(found.labels[:2].tolist()) == {0, 2}
    order = found.labels[:2].argsort()
    overlap, _ = iou(found.boxes[:2][order], cxcywh_to_xyxy(target.boxes))
    assert overlap.min() > 0.9


def test_offsets_and_references_learn_ten_times_slower() -> None:
    model = resolve("deformable_detr/r50")
    with torch.device("meta"):
        module = model.build()
    groups = parameter_groups(module, model.variant.recipes[0])
    names = {id(p): name for name, p in module.named_parameters()}
    slow = {names[id(p)] for g in groups if g["factor"] == 0.1 for p in g["params"]}
    assert slow == {
        name
        for name, p in module.named_parameters()
        if p.requires_grad
        and (name.startswith("backbone.") or "sampling_offsets" in name or "reference_points" in name)
    }


# --- odd pictures and files


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (7, 5), (400, 20)], ids=str)
def test_pictures_of_any_size_are_answered(kind: str, size: tuple[int, int]) -> None:
    output = model(kind)(*pictures(size))
    assert output.boxes.isfinite().all()
    assert output.logits.isfinite().all()
    found = TINY.postprocess(output, torch.tensor([size]))
    assert len(found[0]) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 60}, "multiple of heads"),
        ({"width": 48}, "groups"),
        ({"levels": 1}, "levels"),
        ({"refine": False}, "needs refine"),
    ],
)
def test_impossible_configurations_say_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    config = {"width": 64, "heads": 8, "levels": 4, "refine": True, "two_stage": True, **changes}
    with pytest.raises(ValueError, match=words):
        DeformableDetrConfig(**config)


@pytest.mark.parametrize(
    ("file", "words"),
    [("refine", "queries"), ("plain", "queries"), ("extra levels", "levels")],
)
def test_a_file_of_another_variant_names_what_differs(file: str, words: str) -> None:
    ours, tensors = variant(), model(file).state_dict()
    with pytest.raises(CheckpointError) as caught:
        load_state(ours.build(3), tensors, ours.family, ours.config)
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("layout", ["native", "official", "hub"])
@pytest.mark.parametrize(
    ("file", "wanted", "words"),
    [
        ("r50-refine", "r50-two-stage", "queries"),
        ("r50-two-stage", "r50", "queries"),
        ("r50", "r50-single-scale", "levels"),
    ],
)
def test_a_file_of_another_variant_names_it(file: str, wanted: str, words: str, layout: str) -> None:
    theirs, ours = resolve(f"deformable_detr/{file}"), resolve(f"deformable_detr/{wanted}")
    with torch.device("meta"):
        tensors, module = theirs.build().state_dict(), ours.build()
    if layout != "native":
        tensors = revert(theirs.family.key_maps[layout](theirs.config), tensors)
    with pytest.raises(CheckpointError) as caught:
        load_state(module, tensors, ours.family, ours.config)
    assert words in caught.value.message
    assert f"--model deformable_detr/{file}" in (caught.value.hint or "")


def test_a_refined_file_for_a_plain_model_names_the_variant() -> None:
    """Plain models share one head, refined ones do not: the first contradiction is in the values."""
    theirs, ours = variant("refine"), variant("plain")
    family = replace(
        ours.family, variants=(replace(ours.variant, name="plain"), replace(theirs.variant, name="fine"))
    )
    tensors = revert(family.key_maps["official"](theirs.config), model("refine").state_dict())
    with pytest.raises(CheckpointError, match="class_embed") as caught:
        load_state(ours.build(3), tensors, family, ours.config)
    assert "--model deformable_detr/fine" in (caught.value.hint or "")


def test_a_file_of_other_classes_names_the_head() -> None:
    ours = variant(proposal_channels=None)
    with pytest.raises(CheckpointError, match=r"class_head.*\[3, 64\].*\[5, 64\]"):
        load_state(ours.build(5), ours.build(3).state_dict(), ours.family, ours.config)


def test_unknown_settings_are_refused() -> None:
    from detrcli.models import create_model

    with pytest.raises(UsageError, match="two_stge"):
        create_model("deformable_detr/tiny", two_stge=True)
