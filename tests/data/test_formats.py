"""YOLO, VOC, Roboflow and Hub data sets as real files, and the parsers on anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detrcli.data.catalog import find, resolve
from detrcli.data.check import pictures as pictures_of
from detrcli.data.defects import KINDS
from detrcli.data.formats import voc
from detrcli.data.formats.huggingface import load_rows
from detrcli.data.formats.yolo import label_file, parse_line, read_spec
from detrcli.data.paths import inside, why_outside
from detrcli.data.shapes import load_shapes
from detrcli.data.write import write_coco, write_yolo
from detrcli.errors import DataError, DetrError, UsageError

from .miniature import coco_document, picture, write_pictures


def write_yolo_folder(
    root: Path, yaml: str = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
) -> Path:
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        (root / "images" / split).mkdir(parents=True)
        picture(80, 40).save(root / "images" / split / "one.jpg")
        picture(20, 20).save(root / "images" / split / "two.png")
        lines = "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n"
        (root / "labels" / split / "one.txt").write_text(lines)
    (root / "data.yaml").write_text(yaml)
    return root


def objects(dataset, index: int) -> list[tuple]:
    found = dataset.annotations.objects(index)
    return [
        (dataset.categories.names[label], *np.round(box, 6).tolist())
        for label, box in zip(found.labels, found.boxes, strict=True)
    ]


def test_yolo_boxes_and_outlines_become_pixels(tmp_path):
    root = write_yolo_folder(tmp_path / "y")
    for place in (root, root / "data.yaml"):
        dataset = resolve(str(place), "val")
        assert list(dataset.annotations.names) == ["images/val/one.jpg", "images/val/two.png"]
        assert dataset.annotations.sizes.tolist() == [[40, 80], [20, 20]]
        assert objects(dataset, 0) == [("dog", 30, 10, 20, 20), ("cat", 8, 8, 16, 16)]
        assert objects(dataset, 1) == []
        assert dataset.picture(0).shape == (3, 40, 80)
        assert dataset.defects.counts["no-label-file"] == 1
        assert dataset.defects.errors == 0


@pytest.mark.parametrize("yaml", [
    "path: .\ntrain: ../train/images\nval: ../valid/images\nnc: 2\nnames: {0: cat, 1: dog}",  # as Roboflow exports
    "train: [train/images]\nval: valid\nnames: [cat, dog]",
    "train: train.txt\nval: val.txt\nnames: [cat, dog]",
])  # fmt: skip
def test_yolo_spellings_of_the_same_thing(tmp_path, yaml):
    for split, folder in (("train", "train"), ("val", "valid")):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / folder / "labels").mkdir()
        picture(80, 40).save(tmp_path / folder / "images" / "one.jpg")
        (tmp_path / folder / "labels" / "one.txt").write_text("0 0.5 0.5 0.5 0.5")
        (tmp_path / f"{split}.txt").write_text(f"./{folder}/images/one.jpg\n")
    (tmp_path / "data.yaml").write_text(yaml)
    assert list(find(str(tmp_path)).splits) == ["train", "val"]
    for split in ("train", "val"):
        assert objects(resolve(str(tmp_path), split), 0) == [("cat", 20, 10, 40, 20)]


@pytest.mark.parametrize(("line", "reason"), [
    ("0 0.5 0.5 0.5", "4 numbers"),
    ("0 0.5 0.5 0.5 0.5 0.9", "6 numbers"),
    ("0 0.5 0.5 0.5 0.5 0.9 0.1 0.4", "8 numbers"),
    ("cat 0.5 0.5 0.5 0.5", "not numbers"),
    ("0 nan 0.5 0.5 0.5", "not finite"),
    ("0.5 0.5 0.5 0.5 0.5", "whole number"),
    ("-1 0.5 0.5 0.5 0.5", "whole number"),
    ("0 50 50 20 20", "not in 0..1"),
    ("7 0.5 0.5 0.5 0.5", "class 7 of 2"),
])  # fmt: skip
def test_a_bad_yolo_line_is_named_by_file_and_line(tmp_path, line, reason):
    root = write_yolo_folder(tmp_path / "y")
    (root / "labels" / "train" / "one.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(DataError, match=rf"one\.txt line 2: .*{reason}"):
        resolve(str(root), "train")
    assert len(resolve(str(root), "train", bad_data="skip").annotations.ids) == 1


@pytest.mark.parametrize(("yaml", "reason"), [
    ("", "needs names"),
    ("- a\n- b", "needs names"),
    ("a: [", "not YAML"),
    ("!!python/object/apply:os.system ['true']", "not YAML"),
    ("train: images/train", "no class names"),
    ("train: images/train\nnames: []", "no class names"),
    ("train: images/train\nnames: {a: b}", "class numbers"),
    ("names: [a]", "names no split"),
    ("train: 7\nnames: [a]", "must be a folder"),
    ("train: nowhere\nnames: [a]", "'nowhere' is not there"),
    ("train: /etc\nnames: [a]", "no image at all|refused"),
])  # fmt: skip
def test_a_bad_data_yaml_is_refused_with_the_reason(tmp_path, yaml, reason):
    root = write_yolo_folder(tmp_path / "y", yaml)
    with pytest.raises(DataError, match=reason):
        find(str(root)).load("train")


def test_a_yolo_list_cannot_reach_out_of_its_folder(tmp_path):
    root = write_yolo_folder(tmp_path / "y", "train: list.txt\nnames: [a, b]\n")
    picture(8, 8).save(tmp_path / "secret.png")
    for line in ("../secret.png", str(tmp_path / "secret.png"), "images/../../secret.png"):
        (root / "list.txt").write_text(line)
        with pytest.raises(DataError, match="refused"):
            resolve(str(root), "train")


VOC = """<annotation><filename>{name}</filename><size><width>80</width><height>40</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>80</xmax><ymax>40</ymax></bndbox></object>
<object><name>person</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>21.5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>
</annotation>"""


def write_voc_folder(root: Path, page: str = VOC) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem in ("one", "two"):
        picture(80, 40).save(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations" / f"{stem}.xml").write_text(page.format(name=f"{stem}.jpg"))
    (root / "ImageSets" / "Main" / "train.txt").write_text("one\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("two 1\n")
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("one 1\n")
    return root


def test_voc_counts_from_one_and_ignores_the_difficult(tmp_path):
    root = write_voc_folder(tmp_path / "VOC2012")
    source = find(str(root))
    assert (source.format, list(source.splits)) == ("voc", ["train", "val"])
    dataset = source.load("train")
    assert list(dataset.annotations.names) == ["JPEGImages/one.jpg"]
    assert objects(dataset, 0) == [("dog", 0, 0, 80, 40), ("person", 10, 20.5, 10, 9.5)]
    assert dataset.annotations.crowd.tolist() == [False, True]
    assert dataset.categories.names == tuple(voc.CLASSES)
    assert dataset.categories.ids == tuple(range(1, 21))


def test_voc_classes_of_ones_own_agree_over_the_splits(tmp_path):
    root = write_voc_folder(tmp_path / "v", VOC.replace("dog", "zebra"))
    (root / "Annotations" / "two.xml").write_text(VOC.replace("dog", "ant"))
    names = [find(str(root)).load(split).categories.names for split in ("train", "val")]
    assert names == [("ant", "person", "zebra")] * 2


def test_voc_beside_the_pictures_as_roboflow_exports(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / "r" / split).mkdir(parents=True)
        picture(80, 40).save(tmp_path / "r" / split / "a.b.png")
        (tmp_path / "r" / split / "a.b.xml").write_text(VOC.format(name="other.jpg"))
    source = find(str(tmp_path / "r"))
    assert list(source.splits) == ["train", "val"]
    assert list(source.load("val").annotations.names) == ["valid/a.b.png"]


BOMB = '<!DOCTYPE a [<!ENTITY b "b">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(("page", "reason"), [
    ("", "not XML"),
    ("<annotation>", "not XML"),
    ("<html/>", "its root is <html>"),
    (BOMB, "declares entities"),
    ("<annotation><object/></annotation>", "without a name"),
    ("<annotation><object><name>a</name></object></annotation>", "'a' without four numbers"),
    (VOC.replace("<xmin>1<", "<xmin>left<"), "'dog' without four numbers"),
    (VOC.replace("<xmin>1<", "<xmin>nan<"), "NaN or infinity"),
])  # fmt: skip
def test_a_bad_voc_page_is_named(tmp_path, page, reason):
    root = write_voc_folder(tmp_path / "v")
    (root / "Annotations" / "one.xml").write_text(page)
    with pytest.raises(DataError, match=rf"one\.xml.*{reason}"):
        resolve(str(root), "train")


def test_xml_of_other_programs_is_no_voc(tmp_path):
    """A folder of folders with reports in XML, as a temporary one; with a page among them it is a data set, and they are named."""
    for folder in ("reports", "Annotations", "train"):
        (tmp_path / "t" / folder).mkdir(parents=True)
        (tmp_path / "t" / folder / "junit.xml").write_text("<testsuites/>")
    with pytest.raises(DataError, match="no data set that detr can read") as caught:
        find(str(tmp_path / "t"))
    assert "Annotations/*.xml with JPEGImages/ (Pascal VOC)" in (caught.value.hint or "")
    picture(80, 40).save(tmp_path / "t" / "train" / "one.png")
    (tmp_path / "t" / "train" / "one.xml").write_text(VOC.format(name="one.png"))
    source = find(str(tmp_path / "t"))
    assert list(source.splits) == ["train"]
    with pytest.raises(DataError, match=r"junit\.xml: its root is <testsuites>"):
        source.load("train")


def test_a_coco_file_beside_its_pictures_is_to_be_named(tmp_path):
    place = tmp_path / "my place"
    write_pictures(place)
    (place / "labels.json").write_text(json.dumps(coco_document()))
    (place / "notes.json").write_text('{"author": "me"}')
    with pytest.raises(DataError, match="no data set that detr can read") as caught:
        find(str(place))
    assert (caught.value.hint or "").startswith(f"name the annotation file itself: '{place}/labels.json'; ")
    assert resolve(str(place / "labels.json"), "train").picture(0).shape == (3, 48, 64)


@pytest.mark.parametrize(("count", "told"), [("2", 0), ("3", 1), ("two", 1)])
def test_a_number_of_classes_that_is_not_that_of_the_names_is_told(tmp_path, count, told):
    root = write_yolo_folder(tmp_path / "y", f"train: images/train\nnc: {count}\nnames: [cat, dog]\n")
    dataset = resolve(str(root), "train")
    assert dataset.categories.names == ("cat", "dog")
    assert dataset.defects.counts["class-count"] == told
    assert KINDS["class-count"].severity == "warning"  # which is said at the start of a training, too
    if told:
        assert "there are 2 names" in str(dataset.defects.examples["class-count"][0])


def test_roboflow_coco_folders(tmp_path):
    for split in ("train", "valid", "test"):
        write_pictures(tmp_path / split)
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(coco_document()))
    source = find(str(tmp_path))
    assert (source.format, list(source.splits)) == ("roboflow-coco", ["train", "val", "test"])
    assert source.load("valid").picture(0).shape == (3, 48, 64)


def test_a_single_coco_file_finds_its_pictures(coco_folder):
    dataset = resolve(str(coco_folder / "annotations" / "instances_val2017.json"), "val")
    assert dataset.picture(0).shape == (3, 48, 64)
    with pytest.raises(DataError, match="no split 'train', only val"):
        resolve(str(coco_folder / "annotations" / "instances_val2017.json"), "train")


@pytest.mark.parametrize("write", [write_coco, write_yolo])
def test_what_is_written_is_read_back(tmp_path, write):
    splits = {split: load_shapes("hard", split, count=6) for split in ("train", "val")}
    write(splits, tmp_path / "out")
    for split, dataset in splits.items():
        again = resolve(str(tmp_path / "out"), split)
        assert again.categories.names == dataset.categories.names
        assert np.abs(again.annotations.boxes - dataset.annotations.boxes).max() < 1e-4
        assert (again.annotations.labels == dataset.annotations.labels).all()
        assert (again.picture(3) == dataset.picture(3)).all()
        if write is write_coco:
            assert again.to_coco() == dataset.to_coco() | {"info": again.to_coco()["info"]}


def test_writing_is_whole_or_not_at_all(tmp_path, coco_folder):
    dataset = resolve(str(coco_folder), "train")
    (coco_folder / "train2017" / "turned.jpg").unlink()
    with pytest.raises(DataError, match=r"train2017/turned\.jpg: no such file"):
        write_coco({"train": dataset}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["mini"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        write_coco({"train": dataset}, tmp_path / "full")


def test_yolo_has_one_list_of_classes_for_all_splits(tmp_path, coco_folder):
    """Val lists them with other ids and in another order, and one that train does not know."""
    path = coco_folder / "annotations" / "instances_val2017.json"
    document = coco_document()
    document["categories"] = [{"id": i, "name": name} for i, name in ((3, "dog"), (17, "Cat"), (90, "zebra"))]
    path.write_text(json.dumps(document))
    source = find(str(coco_folder))
    splits = {split: source.load(split) for split in source.splits}
    write_yolo(splits, tmp_path / "out")
    for split, dataset in splits.items():
        again = find(str(tmp_path / "out")).load(split)
        assert again.categories.names == ("cat", "dog", "tooth brush", "zebra")
        kept = ~dataset.annotations.crowd  # crowds have no place there
        ours = {(name.lower(), *box) for name, *box in named(dataset, kept)}
        assert len(ours) == kept.sum()
        assert ours == set(named(again, slice(None)))


def named(dataset, rows):
    labels, boxes = dataset.annotations.labels[rows], np.round(dataset.annotations.boxes[rows], 3)
    return [
        (dataset.categories.names[label], *box) for label, box in zip(labels, boxes.tolist(), strict=True)
    ]


def hub_table(corners: bool = False):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(),
        image_id=datasets.Value("int64"),
        objects={
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
        },
    )
    boxes = [[[50, 20, 79, 39]], []] if corners else [[[50, 20, 29, 19]], []]
    rows = {
        "image": [picture(80, 40), picture(10, 10)],
        "image_id": [31, 4],
        "objects": [{"bbox": b, "category": [1] * len(b)} for b in boxes],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("corners", [False, True])
def test_hub_rows_become_a_data_set(tmp_path, corners):
    dataset = load_rows({"train": hub_table(corners)}, "train", name="hf:me/mine", split="train")
    assert dataset.annotations.image_ids.tolist() == [31, 4]
    assert dataset.annotations.sizes.tolist() == [[40, 80], [10, 10]]
    assert objects(dataset, 0) == [("dog", 50, 20, 29, 19)]
    assert dataset.defects.counts["corner-boxes"] == int(corners)
    assert dataset.picture(0).shape == (3, 40, 80)
    write_coco({"train": dataset}, tmp_path / "out")
    assert objects(resolve(str(tmp_path / "out"), "train"), 0) == [("dog", 50, 20, 29, 19)]


def test_a_hub_data_set_is_loaded_by_its_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    table = hub_table()
    (tmp_path / "repo").mkdir()
    table.to_parquet(tmp_path / "repo" / "train.parquet")
    table.to_parquet(tmp_path / "repo" / "validation.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = find(f"hf:{tmp_path / 'repo'}")
    assert list(source.splits) == ["train", "val"]
    assert objects(source.load("val"), 0) == [("dog", 50, 20, 29, 19)]


@pytest.mark.parametrize("kept", ["bytes", "path"])
def test_pictures_of_hub_rows_are_checked_too(tmp_path, kept):
    """A row holds its picture, or says where it lies, as those of a folder of pictures do."""
    datasets = pytest.importorskip("datasets")
    paths = [tmp_path / name for name in ("good.png", "cut.png", "gone.png")]
    for number, path in enumerate(paths):
        picture(80, 40, number).save(path)
    size = paths[1].stat().st_size
    paths[1].write_bytes(paths[1].read_bytes()[: size // 2])
    pictures = [{"bytes": p.read_bytes() if kept == "bytes" else None, "path": str(p)} for p in paths]
    if kept == "path":
        paths[2].unlink()
    objects = [{"bbox": [[50.0, 20.0, 29.0, 19.0]], "category": ["dog"]}] * 3
    table = datasets.Dataset.from_dict(
        {"image": pictures, "objects": objects},
        features=datasets.Features(
            image=datasets.Image(),
            objects={
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "category": datasets.List(datasets.Value("string")),
            },
        ),
    )
    dataset = load_rows({"train": table}, "train", name="hf:me/mine", split="train")
    assert dataset.annotations.sizes[0].tolist() == [40, 80]
    seen = pictures_of(dataset)
    assert str(seen.defects.examples["unreadable-image"][0]).startswith("row-000001.png: damaged")
    assert seen.bad == {"row-000001.png"} | ({"row-000002.png"} if kept == "path" else set())


def hub_rows(boxes, labels, ids=None):
    """Rows of one column of pictures that are not there, of 80 x 40, whose classes have no list."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": None, "path": "a.png"}] * len(boxes),
        "height": [40] * len(boxes),
        "width": [80] * len(boxes),
        "objects": [{"bbox": b, "category": c} for b, c in zip(boxes, labels, strict=True)],
    }
    if ids is not None:
        columns["image_id"] = ids
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


BOX = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("train", "val", "names"),
    [
        ([3, 7], [7, 5], ["class 3", "class 5", "class 7"]),
        (["dog", "ant"], ["bee", "dog"], ["ant", "bee", "dog"]),
    ],
)
def test_hub_classes_without_a_list_agree_over_the_splits(train, val, names):
    tables = {split: hub_rows([[BOX] * 2], [labels]) for split, labels in (("train", train), ("val", val))}
    for split, labels in (("train", train), ("val", val)):
        dataset = load_rows(tables, split, name="hf:me/mine", split=split)
        assert list(dataset.categories.names) == names
        found = [dataset.categories.names[label] for label in dataset.annotations.labels]
        assert found == [label if isinstance(label, str) else f"class {label}" for label in labels]


@pytest.mark.parametrize(("boxes", "labels", "kind"), [
    ([BOX, BOX[:3]], ["a", "a"], "bad-box"),
    ([BOX, None], ["a", "a"], "bad-box"),
    ([BOX, [1.0, None, 3.0, 4.0]], ["a", "a"], "bad-box"),
    ([BOX], ["a", "a"], "bad-box"),
    ([BOX, [1.0, float("nan"), 3.0, 4.0]], ["a", "a"], "non-finite-box"),
    ([BOX, BOX], ["a", None], "unknown-category"),
    ([BOX, BOX], ["a"], "unknown-category"),
])  # fmt: skip
def test_bad_objects_of_hub_rows_are_named_as_those_of_files(boxes, labels, kind):
    tables = {"train": hub_rows([boxes], [labels])}
    dataset = load_rows(tables, "train", name="hf:me/mine", split="train")
    with pytest.raises(DataError, match=rf"hf:me/mine row 0 object 2: .*{KINDS[kind].means}"):
        dataset.refuse()
    assert dataset.annotations.boxes.tolist() == [BOX]
    assert dataset.defects.counts[kind] == 1


def test_ids_of_hub_rows_are_unique_whole_numbers_or_left_alone():
    def load(ids):
        tables = {"train": hub_rows([[BOX]] * len(ids), [["a"]] * len(ids), ids)}
        return load_rows(tables, "train", name="hf:me/mine", split="train")

    texts = load(["000a", "000b"])
    assert texts.annotations.image_ids.tolist() == [1, 2]
    assert texts.defects.counts["bad-image-id"] == 1
    left = load([31, 31, 4])
    with pytest.raises(DataError, match=r"row 1: 31: two images share an id"):
        left.refuse()
    assert left.annotations.image_ids.tolist() == [31, 4]
    assert list(left.annotations.names) == ["row-000000.png", "row-000002.png"]
    assert len(left.pictures.table) == 2


def test_a_hub_name_that_cannot_be_loaded_says_why(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"hf:.*/nothing cannot be loaded"):
        find(f"hf:{tmp_path}/nothing")


def test_without_the_extra_the_hint_names_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets") as caught:
        find("hf:me/mine")
    assert caught.value.hint == "pip install 'detrcli[hf]'"


ESCAPES = [
    "../x.jpg", "a/../../x.jpg", "/etc/passwd", "\\etc\\passwd", "C:/x.jpg", "c:x.jpg", "C:\\x.jpg", "\\\\host\\share\\x",
    "//host/x.jpg", "a\0.jpg", "", "   ", "..", "a/b/../../../x", "..\\x.jpg", "a\\..\\..\\x.jpg", "./../x.jpg", "../../../../../../etc/shadow",
    "a/./../../x", "/", "\\", "images/../../x.jpg", "./a/../../x", "D:", "..//x",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_its_folder(tmp_path, coco_folder, name):
    assert why_outside(name)
    with pytest.raises(DataError, match="refused"):
        inside(tmp_path, name)
    document = coco_document()
    document["images"][0]["file_name"] = name
    (coco_folder / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="leaves the folder"):
        resolve(str(coco_folder), "train")


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b.jpg", "a/../b.jpg", "...jpg", "a..b/c.jpg", "ü/é.png", "a b.jpg", "./a.jpg"]
)
def test_ordinary_names_stay_inside(tmp_path, name):
    assert why_outside(name) is None
    assert inside(tmp_path, name) == tmp_path / name


def test_links_may_not_leave_the_folder_but_the_folder_may_be_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere.png").touch()
    (tmp_path / "real" / "out.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "real" / "in.png").symlink_to(tmp_path / "real" / "target.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for root in (tmp_path / "real", tmp_path / "link"):
        assert inside(root, "in.png") == root / "in.png"
        with pytest.raises(DataError, match="a link that leaves its folder") as caught:
            inside(root, "out.png")
        assert "DETR_FOLLOW_LINKS=1" in (caught.value.hint or "")
    monkeypatch.setenv("DETR_FOLLOW_LINKS", "1")
    assert inside(tmp_path / "real", "out.png") == tmp_path / "real" / "out.png"
    with pytest.raises(DataError, match="climbs out"):
        inside(tmp_path / "real", "../elsewhere.png")


def test_a_relative_folder_is_that_of_the_moment(tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place / "pictures").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        assert inside(Path("pictures"), "a.png") == Path("pictures/a.png")


@given(st.text(st.sampled_from("./\\ab:C\0 "), max_size=12))
def test_a_name_that_is_accepted_is_inside(name):
    if why_outside(name) is None:
        path = Path("/root/of/pictures")
        joined = Path(*(p for p in (path / name.replace("\\", "/")).parts))
        depth = 0
        for part in joined.relative_to(path).parts:
            depth += -1 if part == ".." else 1
            assert depth >= 0


@settings(max_examples=600, deadline=None)
@given(
    st.text(max_size=40)
    | st.lists(st.floats() | st.integers(), max_size=9).map(lambda v: " ".join(map(str, v)))
)
@example("0 1e400 1 1 1")
@example("٣ 0.1 0.1 0.1 0.1")
def test_a_yolo_line_is_parsed_or_explained(line):
    found = parse_line(line)
    if isinstance(found, str):
        assert found
    else:
        assert found[0] >= 0
        assert all(-0.01 <= v <= 1.01 for v in found[1])


@settings(max_examples=600, deadline=None)
@given(st.text(max_size=60), st.integers(0, len(VOC)), st.integers(0, 60))
def test_a_mutated_voc_page_is_parsed_or_refused(insert, place, cut):
    try:
        page = voc.parse(VOC[:place] + insert + VOC[place + cut :])
    except ValueError:
        return
    assert all(name and len(corners) == 4 for name, _, corners in page.objects)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=80)
    | st.sampled_from(["train: a\n", "names: [a]\n"]).flatmap(
        lambda s: st.text(max_size=40).map(lambda t: s + t)
    )
)
def test_any_yaml_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        spec = read_spec(path)
    except DetrError:
        return
    assert spec.splits
    assert len(spec.categories)


def test_label_files_replace_the_last_images_folder():
    assert label_file("images/train/a.jpg") == "labels/train/a.txt"
    assert label_file("images/x/images/a.b.jpg") == "images/x/labels/a.b.txt"
    assert label_file("train/a.jpg") == "train/a.txt"
    assert label_file("images.jpg") == "images.txt"
