"""`detr data …` as a user types it: streams, exit codes, JSON, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from detrcli.cli import console
from detrcli.cli.app import main
from tests.cli.run import detr as run

from .miniature import coco_document, picture


@pytest.fixture
def detr(monkeypatch, capsys, tmp_path):
    """Runs a command in this process; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DETR_DATA", raising=False)

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "settings", console.Settings())
        monkeypatch.setattr(sys, "argv", ["detr", "data", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        capture = capsys.readouterr()
        return int(caught.value.code or 0), capture.out, capture.err

    return run


def test_check_names_file_and_annotation_and_exits_with_3(detr, coco_folder):
    path = coco_folder / "annotations" / "instances_train2017.json"
    document = coco_document()
    document["annotations"][4]["bbox"] = [1, 2, 0, 4]
    path.write_text(json.dumps(document))
    picture(64, 48, 9).save(coco_folder / "train2017" / "a.jpg")  # the other pictures are those of val
    code, out, err = detr("check", coco_folder)
    assert code == 3
    assert "error: empty-box × 1" in out
    assert "turned.jpg annotation 9: box [1.0, 2.0, 0.0, 4.0]" in out
    assert "error: leak × " in out
    assert "--fix OUT" in err
    code, out, _ = detr("check", coco_folder, "--json")
    found = json.loads(out)
    assert code == 3
    assert (found["format"], found["schema_version"]) == ("coco", 1)
    kinds = {d["kind"]: d for d in found["splits"]["train"]["defects"]}
    assert kinds["empty-box"]["count"] == 1
    assert found["errors"] == sum(
        d["count"] for s in found["splits"].values() for d in s["defects"] if d["severity"] == "error"
    )


def test_fix_writes_a_copy_that_passes(detr, coco_folder, tmp_path):
    path = coco_folder / "annotations" / "instances_val2017.json"
    document = coco_document()
    document["annotations"][4]["bbox"] = [1, 2, float("nan"), 4]
    path.write_text(json.dumps(document))
    for broken in (coco_folder / "train2017" / "a.jpg", coco_folder / "val2017" / "grey.jpg"):
        broken.write_bytes(broken.read_bytes()[:-80])
    before = {p: p.read_bytes() for p in coco_folder.rglob("*") if p.is_file()}
    code, out, err = detr("check", coco_folder, "--fix", "fixed")
    assert code == 0, err
    assert "unreadable-image" in out
    assert {p: p.read_bytes() for p in coco_folder.rglob("*") if p.is_file()} == before
    code, out, _ = detr("check", "fixed", "--json")
    assert code == 0
    splits = json.loads(out)["splits"]
    assert {split: body["images"] for split, body in splits.items()} == {"train": 1, "val": 3}
    assert detr("check", coco_folder, "--fix", "fixed")[0] == 2  # never over something that is there


def test_info_counts(detr, coco_folder):
    code, out, _ = detr("info", coco_folder, "--json")
    train = json.loads(out)["splits"]["train"]
    assert code == 0
    assert train["classes"] == {"cat": 1, "dog": 2, "tooth brush": 1}
    assert [train[k] for k in ("images", "objects", "crowds", "empty_images", "most_objects")] == [
        4,
        4,
        1,
        1,
        2,
    ]
    assert train["width"] == [30, 36, 64]
    assert [train[k] for k in ("small", "medium", "large")] == [3, 1, 0]
    code, out, _ = detr("info", coco_folder)
    assert code == 0
    assert "tooth brush" in out


def test_view_draws_a_contact_sheet(detr, coco_folder, tmp_path):
    code, out, err = detr("view", coco_folder, "--out", "some/where/sheet.png", "--count", "3")
    assert (code, out.strip()) == (0, "some/where/sheet.png"), err
    with Image.open(tmp_path / "some/where/sheet.png") as sheet:
        assert sheet.width > 600
        assert len(sheet.convert("RGB").getcolors(2**24)) > 500
    code, out, _ = detr("view", coco_folder, "--image", "turned.jpg", "--json", "--out", "one.jpg")
    assert json.loads(out)["images"] == ["turned.jpg"]
    code, _, err = detr("view", coco_folder, "--image", "trned.jpg")
    assert (code, "did you mean 'turned.jpg'" in err) == (2, True)
    assert detr("view", coco_folder, "--out", "sheet.txt")[0] == 2
    assert detr("view", coco_folder, "--split", "test")[0] == 3


def test_convert_there_and_back(detr, coco_folder, tmp_path):
    path = coco_folder / "annotations" / "instances_val2017.json"
    document = coco_document()
    document["annotations"][0]["segmentation"] = [[4, 5, 24, 5, 24, 15]]
    path.write_text(json.dumps(document))
    assert detr("convert", coco_folder, "same")[0] == 0
    rows = json.loads((tmp_path / "same" / "annotations" / "instances_val.json").read_text())["annotations"]
    assert [row.get("segmentation") for row in rows] == [[[4, 5, 24, 5, 24, 15]], None, None, None, None]
    assert detr("convert", coco_folder, "y", "--to", "yolo")[0] == 0
    assert detr("convert", "y", "c", "--to", "coco")[0] == 0
    code, out, _ = detr("info", "c", "--json")
    assert json.loads(out)["splits"]["val"]["classes"] == {"cat": 1, "dog": 2, "tooth brush": 1}
    code, _, err = detr("convert", coco_folder, "z", "--to", "yoloo")
    assert (code, "did you mean 'yolo'? known: coco, yolo" in err) == (2, True)
    assert detr("convert", coco_folder, "y")[0] == 2  # the folder is not empty


def test_a_file_name_that_is_not_utf8_is_shown_and_comes_along(detr, coco_folder, tmp_path):
    """Latin-1, as an old archive unpacks it."""
    for folder in ("train2017", "val2017"):
        os.rename(coco_folder / folder / "a.jpg", os.fsencode(coco_folder / folder) + b"/caf\xe9.jpg")
    for file in (coco_folder / "annotations").iterdir():
        file.write_text(file.read_text().replace('"a.jpg"', '"caf\\udce9.jpg"'))
    for source, out, form in ((coco_folder, "c", "coco"), (coco_folder, "y", "yolo"), ("c", "again", "coco")):
        assert detr("convert", source, out, "--to", form)[0] == 0
        names = [name for _, _, names in os.walk(os.fsencode(tmp_path / out)) for name in names]
        assert b"caf\xe9.jpg" in names
    code, out, _ = detr("check", "again")
    assert (code, "caf?.jpg" in out) == (3, True)  # train and val show the same pictures
    code, out, _ = detr("check", "y", "--json")
    assert (code, "caf?.jpg" in out) == (3, True)


def test_half_a_letter_is_no_file_name(detr, coco_folder):
    file = coco_folder / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"a.jpg"', '"\\ud800.jpg"'))
    code, out, _ = detr("check", coco_folder, "--json")
    defects = json.loads(out)["splits"]["train"]["defects"]
    assert code == 3
    assert "half a letter" in next(d for d in defects if d["kind"] == "path-escapes")["examples"][0]


def test_split_cuts_every_class_in_proportion_and_the_same_way_each_time(detr, tmp_path):
    assert detr("shapes", "s", "--train", "60", "--val", "2")[0] == 0
    for out in ("one", "two"):
        code, text, _ = detr("split", "s", out, "--val", "0.2", "--test", "0.1", "--json")
        assert (code, json.loads(text)["images"]) == (0, {"train": 42, "val": 12, "test": 6})
    for split in ("train", "val", "test"):
        files = [tmp_path / out / "annotations" / f"instances_{split}.json" for out in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        rows = json.loads(files[0].read_text())["annotations"]
        assert all(len(row["segmentation"][0]) >= 6 for row in rows)  # outlines come along
    info = json.loads(detr("info", "one", "--json")[1])["splits"]
    assert all(count >= 2 for count in info["val"]["classes"].values())
    assert detr("split", "s", "three", "--val", "1.5")[0] == 2
    assert json.loads(detr("check", "one", "--json")[1])["errors"] == 0


def test_shapes_are_written_whole(detr, tmp_path, monkeypatch):
    code, out, err = detr("shapes", "s", "--train", "3", "--val", "2", "--preset", "hard")
    assert (code, out.strip()) == (0, "s: 3 train, 2 val")
    assert "next: detr data view s" in err
    assert len(list((tmp_path / "s" / "train").glob("*.png"))) == 3
    assert detr("shapes", "s")[0] == 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert detr("shapes", ".", "--train", "3", "--val", "2")[0] == 0
    assert sorted(os.listdir(".")) == ["annotations", "train", "val"]  # still the folder to stand in
    assert json.loads(detr("info", ".", "--json")[1])["splits"]["train"]["images"] == 3
    assert detr("shapes", "t", "--preset", "hrad")[0] == 2
    assert detr("shapes", "t", "--train", "0")[0] == 2


def test_a_folder_that_cannot_be_written_is_named(detr, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = detr("shapes", "file/out", "--train", "1", "--val", "1")
    assert (code, "cannot write" in err, "Traceback" in err) == (1, True, False)


@pytest.mark.parametrize(
    "words",
    [
        ("data", "check", "DATA", "--fix", "file/x"),
        ("data", "convert", "DATA", "file/x"),
        ("data", "split", "DATA", "file/x"),
        ("data", "view", "DATA", "--out", "file/x.png"),
        ("train", "DATA", "-m", "detr/tiny", "--out", "file/x"),
        ("profile", "--plot", "file/x.svg"),
        ("zoo", "new", "mine", "--out", "file/x"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_written_ends_every_command_alike(coco_folder, tmp_path, words):
    (coco_folder / "annotations" / "instances_val2017.json").unlink()  # its pictures are those of train
    (tmp_path / "file").touch()
    done = run(*(coco_folder if word == "DATA" else word for word in words), cwd=tmp_path)
    assert "cannot" in done.error(1)
    assert "defect of detrcli" not in done.err


def test_a_place_that_is_taken_is_told_before_the_work(detr, coco_folder, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    monkeypatch.setattr("detrcli.data.check.pictures", lambda *a, **k: pytest.fail("the work has begun"))
    code, _, err = detr("check", coco_folder, "--fix", "taken")
    assert (code, "taken exists and is not an empty folder" in err) == (2, True)


def test_a_copy_is_offered_only_where_it_would_be_better(detr, coco_folder, tmp_path):
    """All pictures of train are those of val: a copy would have none to train on. Another has no object at all."""
    code, _, err = detr("check", coco_folder)
    assert (code, "--fix" in err) == (3, False)
    code, _, err = detr("check", coco_folder, "--fix", "copy")
    assert (code, "no picture of train can be used" in err) == (3, True)
    assert not (tmp_path / "copy").exists()
    (coco_folder / "annotations" / "instances_val2017.json").unlink()
    path = coco_folder / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(coco_document() | {"annotations": []}))
    code, out, err = detr("check", coco_folder)
    assert (code, "no object at all" in out, "--fix" in err) == (3, True, False)
    done = run("train", coco_folder, "-m", "detr/tiny", cwd=tmp_path)
    assert "no object at all" in done.error(3)
    assert "see all: detr data check" in done.err
    assert "--fix" not in done.err


def test_suggested_commands_can_be_typed(detr, coco_folder, tmp_path):
    """A root that the user named is in them, and what has a space in it stands in quotes."""
    root = tmp_path / "my data"
    root.mkdir()
    os.rename(coco_folder, root / "coco")
    path = root / "coco" / "annotations" / "instances_train2017.json"
    document = coco_document()
    document["annotations"][4]["bbox"] = [1, 2, float("nan"), 4]
    path.write_text(json.dumps(document))
    picture(64, 48, 9).save(root / "coco" / "train2017" / "a.jpg")
    typed = f"detr data check coco --data-root '{root}'"
    done = run("train", "coco", "-m", "detr/tiny", "--data-root", root, cwd=tmp_path)
    assert "NaN" in done.error(3)
    assert f"see all: {typed}   repair a copy: {typed} --fix OUT" in done.err
    assert f"next: {typed} --fix OUT" in detr("check", "coco", "--data-root", root)[2]
    assert f"see {typed}\n" in detr("info", "coco", "--data-root", root)[2]
    assert f"detr data check '{root}/coco' --fix" in detr("check", root / "coco")[2]
    assert "next: detr data view 'my shapes'" in detr("shapes", "my shapes", "--train", 2, "--val", 1)[2]


def test_errors_are_json_when_json_is_asked_for(detr):
    code, out, _ = detr("info", "nothing_here", "--json")
    error = json.loads(out)["error"]
    assert (code, error["kind"], error["exit_code"]) == (2, "usage", 2)
    code, out, _ = detr("info", "coco", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (3, "data")


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full, on this system"
)
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["zoo", "list", "--json"], 1, "cannot write on stdout: No space left"),
        (["zoo", "list"], 1, "cannot write on stdout: No space left"),
        (["train", "shapes", "-m", "deter", "--json"], 2, "unknown model 'deter'"),
    ],
)
def test_a_stdout_that_is_full_is_told_in_one_line(words, code, says):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "detrcli", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(f"error: {says}")
    assert len(done.stderr.splitlines()) == 2  # with the hint


def test_a_stdout_of_few_letters_gets_what_it_can_hold(coco_folder):
    command = [sys.executable, "-m", "detrcli", "data", "check", coco_folder]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert "error: leak ? " in done.stdout


def test_help_does_not_load_torch():
    script = "import sys, detrcli.cli.data; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 0
