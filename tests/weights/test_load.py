"""From tensors to a model: layouts recognised, everything accounted for, classes by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import detrcli
from detrcli.errors import CheckpointError, UsageError
from detrcli.types import Categories
from detrcli.weights import keymap
from detrcli.weights.file import save
from detrcli.weights.labels import named_in
from detrcli.weights.load import LoadReport, count_classes, load_state, load_weights
from detrcli.weights.metadata import Metadata
from detrcli.weights.opened import open_weights
from detrcli.weights.resolve import choose
from detrcli.weights.warm import told, warm_start

NAME = "detr/tiny"
OLD = Categories((0, 1, 2), ("cat", "dog", "bird"))


def model(num_classes: int = 3):
    torch.manual_seed(num_classes)
    return detrcli.create_model(NAME, num_classes=num_classes)


def foreign(layout: str) -> dict[str, torch.Tensor]:
    made = model()
    family, config = made.detrcli_model.family, made.detrcli_model.config
    return keymap.revert(family.key_maps[layout](config), made.state_dict())


def fill(module, tensors, **options) -> LoadReport:
    return load_state(module, tensors, module.detrcli_model.family, module.detrcli_model.config, **options)


@pytest.mark.parametrize("layout", ["native", "official", "hub"])
def test_every_layout_is_recognised_by_its_names(layout: str):
    wanted = model()
    tensors = wanted.state_dict() if layout == "native" else foreign(layout)
    filled = detrcli.create_model(NAME)
    report = fill(filled, tensors)
    assert report.layout == layout
    assert set(report.kept) == set(wanted.state_dict())
    assert not str(report)
    assert all(torch.equal(filled.state_dict()[n], t) for n, t in wanted.state_dict().items())


def test_what_does_not_fit_is_listed_in_one_message_and_nothing_is_loaded():
    tensors = model().state_dict()
    del tensors["class_head.weight"], tensors["class_head.bias"]
    tensors["stray.weight"] = torch.zeros(1)
    tensors["query_embed.weight"] = torch.zeros(7, 64)
    filled = model(3)
    before = {n: t.clone() for n, t in filled.state_dict().items()}
    with pytest.raises(CheckpointError) as misfit:
        fill(filled, tensors, source="x.pth")
    message = misfit.value.message
    assert message.startswith("x.pth does not fit this model")
    assert "2 missing: class_head.weight, class_head.bias" in message
    assert "1 unexpected: stray.weight" in message
    assert "1 of other shape: query_embed.weight [7, 64] (model: [10, 64])" in message
    assert all(torch.equal(filled.state_dict()[n], t) for n, t in before.items())


def test_unexpected_names_are_those_of_the_file():
    tensors = foreign("hub") | {"model.encoder.layers.9.fc1.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected: model\.encoder\.layers\.9\.fc1\.weight"):
        fill(model(), tensors)


def test_another_model_is_called_that_and_long_lists_are_cut():
    with pytest.raises(CheckpointError) as misfit:
        fill(model(), {f"other.{i}": torch.zeros(1) for i in range(400)})
    assert "another model" in (misfit.value.hint or "")
    assert "… 394 more" in misfit.value.message
    assert len(misfit.value.message) < 1500


def test_another_number_of_classes_is_an_error_unless_classes_are_given():
    with pytest.raises(CheckpointError, match="of other shape: class_head") as misfit:
        fill(model(5), model(3).state_dict())
    assert "the file has 3 classes, this model 5: build it with num_classes=3" in (misfit.value.hint or "")
    assert "classes=" in (misfit.value.hint or "")


def test_other_rows_than_those_of_classes_are_not_called_classes():
    tensors = model().state_dict() | {"query_embed.weight": torch.zeros(7, 64)}
    with pytest.raises(CheckpointError, match="of other shape: query_embed") as misfit:
        fill(model(), tensors)
    assert misfit.value.hint == "the file is of another configuration"


def test_rows_of_classes_go_over_by_name_and_no_object_with_them():
    donor, filled = model(3), model(5)
    fresh = filled.class_head.weight.clone()
    new = Categories((1, 2, 3, 4, 5), ("zebra", "bird", "cat", "ant", "dog"))
    report = fill(filled, donor.state_dict(), classes=(OLD, new))
    assert set(report.remade) == {"class_head.weight", "class_head.bias"}
    assert report.copied_classes == ("bird", "cat", "dog")
    row = filled.class_head.weight
    for name in ("bird", "cat", "dog"):
        assert torch.equal(row[new.label_named(name)], donor.class_head.weight[OLD.label_named(name)])
    assert torch.equal(row[-1], donor.class_head.weight[-1])
    assert torch.equal(row[0], fresh[0])
    assert torch.equal(row[3], fresh[3])
    assert "class_head.weight, class_head.bias; rows taken over: bird, cat, dog" in told(report)[1]


def test_unknown_old_classes_give_a_fresh_head_and_an_old_body():
    donor, filled = model(3), model(5)
    fresh = filled.class_head.weight.clone()
    new = Categories(tuple(range(5)), tuple("abcde"))
    report = fill(filled, donor.state_dict(), classes=(None, new))
    assert report.copied_classes == ()
    assert torch.equal(filled.class_head.weight, fresh)
    assert torch.equal(filled.encoder.layers[0].norm1.weight, donor.encoder.layers[0].norm1.weight)


def test_the_same_number_of_classes_in_another_order_is_not_taken_for_the_same():
    donor, filled = model(3), model(3)
    new = Categories((0, 1, 2), ("dog", "cat", "fox"))
    fill(filled, donor.state_dict(), classes=(OLD, new))
    row = filled.class_head.weight
    assert torch.equal(row[0], donor.class_head.weight[1])
    assert torch.equal(row[1], donor.class_head.weight[0])


def test_classes_do_not_excuse_other_shapes():
    tensors = model(3).state_dict()
    tensors["query_embed.weight"] = torch.zeros(7, 64)
    new = Categories(tuple(range(5)), tuple("abcde"))
    with pytest.raises(CheckpointError, match=r"1 of other shape: query_embed\.weight"):
        fill(model(5), tensors, classes=(OLD, new))


@pytest.mark.parametrize("classes", [1, 3, 91])
def test_classes_are_counted_from_the_heads(classes: int):
    blank = model(3)
    family, config = blank.detrcli_model.family, blank.detrcli_model.config
    assert count_classes(model(classes).state_dict(), family, config, 3, blank) == classes


def test_the_public_function_takes_a_path_and_tells_strangers(tmp_path: Path):
    donor = model()
    save(tmp_path / "w.safetensors", donor.state_dict(), Metadata(model=NAME, num_classes=3))
    filled = detrcli.create_model(NAME)
    assert len(detrcli.load_weights(filled, tmp_path / "w.safetensors").kept) == len(donor.state_dict())
    with pytest.raises(UsageError, match="not made by detrcli"):
        detrcli.load_weights(torch.nn.Linear(1, 1), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="holds detr/tiny, not detr/r50"):
        detrcli.load_weights(detrcli.create_model("detr/r50"), tmp_path / "w.safetensors")


def as_coco(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file in the papers' layout, with the 91 channels of COCO and no word about them."""
    made = model(91)
    family, config = made.detrcli_model.family, made.detrcli_model.config
    save_file(
        keymap.revert(family.key_maps["official"](config), made.state_dict()), tmp_path / "x.safetensors"
    )
    return tmp_path / "x.safetensors", made.state_dict()


@pytest.mark.parametrize("start", [load_weights, warm_start])
def test_a_nameless_file_with_as_many_classes_as_coco_gives_their_rows(tmp_path: Path, start: Any):
    path, theirs = as_coco(tmp_path)
    wanted = Categories((1, 2, 3), ("Dog", "unicorn", "person"))
    filled = model(3)
    fresh = filled.state_dict()["class_head.weight"].clone()
    report = start(filled, path, filled.detrcli_model, classes=wanted)
    assert report.copied_classes == ("Dog", "person")
    ours, rows = filled.state_dict()["class_head.weight"], theirs["class_head.weight"]
    assert torch.equal(ours[[0, 2, 3]], rows[[18, 1, 91]])  # COCO's ids, and no object
    assert torch.equal(ours[1], fresh[1])


def test_names_beside_a_foreign_file_are_those_of_its_classes(tmp_path: Path):
    save_file(foreign("hub"), tmp_path / "model.safetensors")
    labels = {str(i): name for i, name in enumerate(OLD.names)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    assert open_weights(choose(NAME, str(tmp_path))).categories.names == OLD.names
    filled = model(2)
    report = load_weights(filled, tmp_path, filled.detrcli_model, classes=Categories((5, 9), ("bird", "bat")))
    assert report.copied_classes == ("bird",)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"id2label": {"0": "a"}}', '{"id2label": {"0": "a", "1": "a", "2": "a"}}']
)
def test_a_configuration_that_does_not_name_them_is_passed_over(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    assert named_in(tmp_path / "config.json", 3) is None


def test_another_number_of_queries_is_not_taken_for_classes():
    tensors = model().state_dict()
    tensors["query_embed.weight"] = torch.zeros(20, 64)
    made = model()
    family, config = made.detrcli_model.family, made.detrcli_model.config
    assert count_classes(tensors, family, config, 3, made) == 3
