"""The conformance kit notices a model that breaks a promise, and says which and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any
from unittest import SkipTest

import pytest
import torch
from torch import Tensor, nn

from detrcli import testing
from detrcli.errors import UsageError
from detrcli.export import plan
from detrcli.plugins import Model, Published, Weights, resolve
from detrcli.testing import answers, behaviour, declaration, learning
from detrcli.types import Detections, Output

SOUND = resolve("detr/tiny")


class Changed(nn.Module):
    """A sound model whose answers are changed."""

    def __init__(self, inner: nn.Module, change: Callable[[Output, Tensor], Output]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        return self.change(self.inner(images, mask), images)


def with_family(**changes: Any) -> Model:
    return replace(SOUND, family=replace(SOUND.family, **changes))


def with_variant(**changes: Any) -> Model:
    return replace(SOUND, variant=replace(SOUND.variant, **changes))


def answering(change: Callable[[Output, Tensor], Output]) -> Model:
    return with_family(
        build_model=lambda config, count: Changed(SOUND.family.build_model(config, count), change)
    )


def deciding(change: Callable[[Detections, Tensor], Detections]) -> Model:
    def postprocess(config: Any, output: Output, sizes: Tensor) -> list[Detections]:
        found = SOUND.family.postprocess(config, output, sizes)
        return [change(one, size) for one, size in zip(found, sizes, strict=True)]

    return with_family(postprocess=postprocess)


def losing(change: Callable[[Any, list], Any]) -> Model:
    def build(config: Any, count: int) -> Any:
        criterion = SOUND.family.build_criterion(config, count)
        return lambda output, targets: change(criterion(output, targets), targets)

    return with_family(build_criterion=build)


def idle(config: Any, count: int) -> nn.Module:
    module = SOUND.family.build_model(config, count)
    module.unused = nn.Parameter(torch.zeros(1))
    return module


def mixing(output: Output, images: Tensor) -> Output:
    weights = torch.arange(1.0, len(images) + 1)[:, None, None]
    return replace(output, logits=output.logits + (weights * output.logits).sum(0, keepdim=True))


def outside(output: Output, images: Tensor) -> Output:
    return replace(output, boxes=output.boxes * 1.5 + 0.3)


@dataclass(frozen=True)
class Odd:
    """A configuration that JSON cannot carry."""

    sides: frozenset[int] = frozenset({3})


@dataclass(frozen=True)
class Unbounded:
    """A configuration that takes what no model can be built of."""

    num_queries: int = 10


def zero(losses: Any) -> Any:
    return replace(losses, total=0 * losses.total)


def empty_is_nan(losses: Any, targets: list) -> Any:
    nothing = not any(len(target.labels) for target in targets)
    return replace(losses, total=losses.total * float("nan")) if nothing else losses


def swapped(found: Detections, size: Tensor) -> Detections:
    return replace(found, boxes=found.boxes[:, [1, 0, 3, 2]])


BROKEN: dict[str, tuple[Callable[[Model], None], Model, str]] = {
    "a name with a space": (declaration.names_are_plain, with_variant(name="R 50"), "small letters"),
    "numbers from nowhere": (declaration.numbers_have_sources, with_variant(published=Published(source="")), "source="),
    "a wrong count": (declaration.parameters_are_counted, with_variant(params=7), "declared are 7"),
    "a module in no part": (declaration.parts_cover_the_model, with_family(parts={"backbone": ("backbone",)}), "in 0 of parts"),
    "a factor for nothing": (
        declaration.recipes_name_parameters,
        with_variant(recipes=(replace(SOUND.variant.recipes[0], lr_factors={"bckbone": 0.1}),)),
        "no parameter matches",
    ),
    "an unknown layout": (
        declaration.declared_weights_can_be_read,
        with_variant(weights=(Weights(repo="a/b", filename="c", license="mit", layout="mine"),)),
        "layout 'mine'",
    ),
    "a page without it": (declaration.the_page_names_every_variant, with_variant(name="r18"), "does not speak of"),
    "logits that are not finite": (
        behaviour.outputs_have_their_shapes,
        answering(lambda o, _: replace(o, logits=o.logits / 0)),
        "not finite",
    ),
    "boxes outside": (behaviour.outputs_have_their_shapes, answering(outside), "sigmoid"),
    "other numbers": (
        behaviour.outputs_have_their_shapes,
        answering(lambda o, _: replace(o, logits=o.logits.double())),
        "not float32",
    ),
    "too many channels": (
        behaviour.outputs_have_their_shapes,
        answering(lambda o, _: replace(o, logits=o.logits.repeat(1, 1, 2))),
        "channels for 3 classes",
    ),
    "noise in eval mode": (
        behaviour.evaluation_is_deterministic,
        answering(lambda o, _: replace(o, logits=o.logits + torch.rand(()))),
        "noise is left on",
    ),
    "pictures that are mixed": (behaviour.pictures_do_not_see_each_other, answering(mixing), "place in the batch"),
    "padding that nobody spoke of": (behaviour.padding_is_never_read, with_family(masked_after=""), "masked_after=MODULE"),
    "another model than before": (
        behaviour.models_are_what_they_were,
        with_variant(config=replace(SOUND.config, num_queries=SOUND.config.num_queries + 1)),
        "python -m detrcli.testing detr",
    ),
    "a number of nothing": (behaviour.sizes_have_bounds, with_variant(config=Unbounded()), "takes num_queries=0 and breaks"),
    "an idle parameter": (learning.every_parameter_learns, with_family(build_model=idle), "unused"),
    "a loss that nothing follows": (learning.the_loss_falls, losing(lambda losses, _: zero(losses)), "12 steps"),
    "a loss that needs objects": (learning.losses_stand_odd_targets, losing(empty_is_nan), "for [0, 0] objects"),
    "detections in disorder": (
        answers.detections_are_in_pixels,
        deciding(lambda found, _: replace(found, scores=found.scores.flip(0))),
        "best first",
    ),
    "labels of no object": (
        answers.detections_are_in_pixels,
        deciding(lambda found, _: replace(found, labels=found.labels + 3)),
        "no-object channel",
    ),
    "x for y": (answers.perfect_answers_return_the_truth, deciding(swapped), "label and box in pixels"),
    "boxes that are moved": (answers.perfect_answers_score_one, deciding(lambda f, _: replace(f, boxes=f.boxes + 4)), "not 1"),
    "a configuration that cannot travel": (declaration.configurations_travel, with_variant(config=Odd()), "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name):
    check, model, said = BROKEN[name]
    with pytest.raises((AssertionError, TypeError, UsageError)) as caught:
        check(model)
    assert said in str(caught.value)


def test_padding_that_is_read_is_noticed():
    """Without its mask the transformer attends to everything."""

    class Unmasked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
            return self.inner(images)

    def build(config: Any, count: int) -> nn.Module:
        return Unmasked(SOUND.family.build_model(config, count))

    model = with_family(build_model=build, masked_after=f"inner.{SOUND.family.masked_after}")
    with pytest.raises(AssertionError, match="hide masked tokens"):
        behaviour.padding_is_never_read(model)


def test_an_import_of_torch_in_the_declaration_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "heavy_plugin.py").write_text("import torch\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    point = replace_entry_point(SOUND, "heavy_plugin:plugin")
    with pytest.raises(AssertionError, match="import it inside the builders"):
        declaration.declaration_is_light(point)


def replace_entry_point(model: Model, value: str) -> Model:
    return replace(model, found=replace(model.found, entry_point=EntryPoint("x", value, "detrcli.models")))


def test_a_family_that_is_not_installed_is_no_empty_test():
    with pytest.raises(UsageError, match="unknown model 'anchr_detr'"):
        testing.models_of("anchr_detr")


def test_what_cannot_be_exported_says_why_and_is_left_out():
    with pytest.raises(SkipTest, match="it asks an oracle"):
        answers.exported_files_answer_the_same(with_family(cannot_export="it asks an oracle"))


def test_without_onnx_the_export_is_skipped_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(SkipTest, match=r"pip install 'detrcli\[onnx\]'"):
        answers.exported_files_answer_the_same(SOUND)


def test_a_forward_that_no_graph_can_hold_is_noticed():
    pytest.importorskip("onnxscript")

    def branching(output: Output, images: Tensor) -> Output:
        return output if float(output.boxes.sum()) > 0 else replace(output, boxes=1 - output.boxes)

    with pytest.raises(AssertionError, match="cannot_export=WHY"):
        answers.exported_files_answer_the_same(answering(branching))
