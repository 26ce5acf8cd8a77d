from __future__ import annotations

import os

import pytest

from detrcli.data.catalog import find, resolve
from detrcli.data.places import names
from detrcli.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
    """No data set of the machine that runs the tests is in reach."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DETR_DATA", raising=False)


def test_shapes_are_built_in():
    assert list(find("shapes").splits) == ["train", "val", "test"]
    assert resolve("shapes:hard", "val").picture(0).shape == (3, 128, 128)
    assert len(resolve("shapes", "validation")) == 200
    with pytest.raises(UsageError, match="unknown preset"):
        find("shapes:big")


def test_a_name_is_looked_up_in_every_place_in_order(tmp_path, coco_folder, monkeypatch):
    root = coco_folder.parent
    assert find("mini", root).format == "coco"
    monkeypatch.setenv("DETR_DATA", os.pathsep.join([str(tmp_path / "none"), str(root)]))
    assert find("mini").format == "coco"
    monkeypatch.delenv("DETR_DATA")
    (tmp_path / "work" / "data").symlink_to(root)
    assert find("mini").format == "coco"
    assert "mini" in names()


@pytest.mark.parametrize("table", [
    '[mine]\npath = "{root}"',
    '[mine]\ntrain = {{annotations = "{root}/annotations/instances_train2017.json", images = "{root}/train2017"}}\n'
    'valid = {{annotations = "{root}/annotations/instances_val2017.json", images = "{root}/val2017"}}',
])  # fmt: skip
@pytest.mark.parametrize("place", ["work/datasets.toml", "config/detrcli/datasets.toml"])
def test_a_name_may_be_registered_in_a_file(tmp_path, coco_folder, table, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(table.format(root=coco_folder))
    assert list(find("mine").splits) == ["train", "val"]
    assert resolve("mine", "val").picture(0).shape == (3, 48, 64)
    assert "mine" in names()


@pytest.mark.parametrize(
    "table", ["[mine", "mine = 3", '[mine]\npath = "nowhere"', "[mine]\ntrain = 3", "[mine]\nx = {a = 1}"]
)
def test_a_register_that_is_not_understood_is_named(tmp_path, table):
    (tmp_path / "work" / "datasets.toml").write_text(table)
    with pytest.raises(DataError, match=r"datasets\.toml"):
        find("mine")


def test_coco_that_is_not_there_says_where_it_looked_and_what_to_fetch(tmp_path):
    with pytest.raises(DataError, match="coco is not on this machine") as caught:
        find("coco", tmp_path / "sets")
    assert str(tmp_path / "sets" / "coco") in caught.value.message
    for part in (
        "instances_{train,val}2017.json",
        "zips/train2017.zip",
        "annotations_trainval2017.zip",
        "--data-root",
    ):
        assert part in (caught.value.hint or "")


def test_an_unknown_name_is_a_usage_error_with_the_nearest(coco_folder):
    with pytest.raises(UsageError, match="unknown data set 'mimi'") as caught:
        find("mimi", coco_folder.parent)
    assert "did you mean 'mini'" in (caught.value.hint or "")
    with pytest.raises(UsageError) as caught:
        find("shape")
    assert "'shapes'" in (caught.value.hint or "")


def test_a_name_may_have_dots(tmp_path, coco_folder):
    """As every export of Roboflow has."""
    root = coco_folder.parent
    coco_folder.rename(root / "Pets.v3i.coco")
    assert find("Pets.v3i.coco", root).format == "coco"
    (tmp_path / "work" / "datasets.toml").write_text(f'["Cats.v1"]\npath = "{root}/Pets.v3i.coco"')
    assert find("Cats.v1").format == "coco"
    with pytest.raises(UsageError, match=r"unknown data set 'Pets\.v3\.coco'") as caught:
        find("Pets.v3.coco", root)
    assert "did you mean 'Pets.v3i.coco'" in (caught.value.hint or "")


def test_a_path_is_never_taken_for_a_name(tmp_path, coco_folder):
    for name in ("./mini", "no/such", "mini.json", str(tmp_path / "absent")):
        with pytest.raises(UsageError, match="no such file or folder"):
            find(name, coco_folder.parent)
    with pytest.raises(UsageError) as caught:
        find(str(coco_folder.parent / "mimi"))
    assert "mini" in (caught.value.hint or "")
    with pytest.raises(UsageError):
        find("x" * 5000)
    with pytest.raises(UsageError):
        find("a\0b")


@pytest.mark.parametrize("make", ["empty", "pictures", "text"])
def test_a_path_without_a_data_set_says_which_layouts_are_known(tmp_path, make):
    place = tmp_path / "place"
    if make == "text":
        place.write_text("hello")
    else:
        place.mkdir()
        if make == "pictures":
            (place / "a.jpg").touch()
    with pytest.raises(DataError, match="no data set that detr can read") as caught:
        find(str(place))
    assert all(kind in (caught.value.hint or "") for kind in ("COCO", "Roboflow", "YOLO", "VOC"))


def test_a_split_that_is_missing_says_which_there_are(coco_folder):
    with pytest.raises(DataError, match="has no split 'test', only train, val") as caught:
        resolve(str(coco_folder), "test")
    assert caught.value.hint == f"make one: detr data split {coco_folder} OUT --test 0.1"
    with pytest.raises(DataError) as caught:
        resolve(str(coco_folder), "nope")
    assert caught.value.hint == "name one of these: --split train"


def test_what_is_odd_but_harmless_is_loaded_and_remembered(coco_folder):
    dataset = resolve(str(coco_folder), "train")
    assert dict(dataset.defects.counts) == {"empty-image": 1}
