"""`detr train` as people type it: what it says, what it keeps of what was typed, what it refuses."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest

from tests.cli.run import detr

TINY = ("-m", "detr/tiny", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def place(shapes, tmp_path):
    """A folder to work in, with a data set, and one elsewhere."""
    shutil.copytree(shapes, tmp_path / "begun" / "toys")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "begun"


def test_a_run_goes_on_from_any_folder(place):
    """Paths are kept whole, so that its settings run again elsewhere, too; what is sent on with the weights is the name alone."""
    elsewhere = place.parent / "elsewhere"
    done = detr("train", "toys", *TINY, "--steps", "1", "--out", "run", cwd=place)
    assert done.code == 0, done.err
    assert tomllib.loads((place / "run" / "config.toml").read_text())["data"] == str(place / "toys")
    assert str(place).encode() not in (place / "run" / "best.safetensors").read_bytes()
    done = detr("train", "--resume", "../begun/run", "--steps", "2", cwd=elsewhere)
    assert done.code == 0, done.err
    done = detr("train", "../begun/toys", "--resume", "../begun/run", "--steps", "3", cwd=elsewhere)
    assert done.code == 0, done.err  # the same data, typed otherwise
    words = ("--config", "../begun/run/config.toml", "--steps", "1", "--weights", "../begun/run")
    assert detr("train", *words, "--out", "again", cwd=elsewhere).code == 0
    assert (
        detr("train", "--config", elsewhere / "again" / "config.toml", "--out", "third", cwd=place).code == 0
    )


def test_a_run_from_before_paths_were_kept_whole_goes_on_where_it_began(place):
    detr("train", "toys", *TINY, "--steps", "1", "--out", "run", cwd=place)
    config, about = place / "run" / "config.toml", place / "run" / "run.json"
    config.write_text(config.read_text().replace(str(place / "toys"), "toys"))
    about.write_text(json.dumps(json.loads(about.read_text()) | {"data": "toys"}))
    done = detr("train", "toys", "--resume", "run", "--steps", "2", cwd=place)
    assert done.code == 0, done.err
    assert "to the same numbers" in config.read_text()


def test_names_stay_names(place):
    done = detr("train", "shapes", *TINY, "--steps", "1", "--out", "run", cwd=place)
    assert done.code == 0, done.err
    assert tomllib.loads((place / "run" / "config.toml").read_text())["data"] == "shapes"


def test_quiet_says_the_result_and_nothing_else(place):
    done = detr("-q", "train", "toys", *TINY, "--steps", "1", "--out", "my run", cwd=place)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("best AP 0.")
    assert done.out.endswith(" · my run\n")
    assert "--weights 'my run'" in detr("train", "--resume", "my run", cwd=place).err


@pytest.mark.parametrize(
    ("words", "says", "hints"),
    [
        (("--freeze", "decodr"), "no such part or parameter", "did you mean 'decoder'? parts: backbone,"),
        (
            ("--set", "recipe.lr_factors.backbnoe=0.5"),
            "recipe.lr_factors: no parameter's name has 'backbnoe' in it",
            "such as backbone.",
        ),
        (
            ("--set", "model.backbone.frozen=['nothing']"),
            "model.backbone.frozen: test_resnet has no 'nothing'",
            "conv1, ",
        ),
        (("--lr", "2", "--set", "recipe.lr=1"), "lr is to be 2.0, and recipe.lr 1", "leave one of them out"),
        (
            ("--epochs", "3", "--set", "recipe.epochs=4"),
            "epochs is to be 3, and recipe.epochs 4",
            "--epochs 3",
        ),
        (
            ("--set", "recipe.batch_size=5"),
            "batch_size is to be 4, and recipe.batch_size 5",
            "--batch-size 4",
        ),
    ],
)
def test_what_means_nothing_is_refused_with_what_to_type(place, words, says, hints):
    done = detr("train", "toys", *TINY, *words, cwd=place)
    assert says in done.error(2)
    assert hints in done.err.split("hint: ", 1)[1]


def test_the_same_said_twice_is_no_contradiction(place):
    words = ("--lr", "2e-4", "--set", "recipe.lr=0.0002", "--set", "recipe.batch_size=4", "--steps", "1")
    assert detr("train", "toys", *TINY, *words, "--out", "run", cwd=place).code == 0


def test_a_file_that_says_two_things_is_refused_with_the_line(place):
    (place / "my.toml").write_text('data = "toys"\nmodel = "detr/tiny"\nlr = 1.0\n[set.recipe]\nlr = 2.0\n')
    assert "my.toml:5: lr is to be 1.0, and recipe.lr 2.0" in detr(
        "train", "--config", "my.toml", cwd=place
    ).error(2)


def test_settings_are_named_as_they_are_typed(place):
    detr("train", "toys", *TINY, "--steps", "1", "--out", "run", cwd=place)
    done = detr("train", "--resume", "run", "--set", "model.num_queries=7", cwd=place)
    assert "started with model.num_queries = " in done.error(2)
    shown = detr("train", "toys", *TINY, "--dry-run", cwd=place).out
    assert "model.num_queries" in shown
    assert "config." not in shown


def test_weights_that_do_not_fit_for_what_set_changed_say_so(place):
    detr("train", "toys", *TINY, "--steps", "1", "--out", "run", cwd=place)
    done = detr("train", "toys", *TINY, "--weights", "run", "--set", "model.decoder_layers=5", cwd=place)
    assert "does not fit" in done.error(4)
    assert "leave out --set of decoder_layers" in done.err
    assert "type --model" not in done.err


@pytest.mark.parametrize(("val", "told"), [("images/train", True), ("images/val", False), ("val.txt", True)])
def test_scores_on_the_pictures_of_train_are_told(place, val, told):
    detr("data", "convert", "toys", "yolo", "--to", "yolo", cwd=place)
    names = sorted(path.name for path in (place / "yolo" / "images" / "train").iterdir())
    (place / "yolo" / "val.txt").write_text("".join(f"images/train/{name}\n" for name in names[:3]))
    (place / "yolo" / "data.yaml").write_text(
        f"train: images/train\nval: {val}\nnames: [circle, square, triangle]\n"
    )
    done = detr("train", "yolo", *TINY, "--steps", "1", "--out", "run", cwd=place)
    assert done.code == 0, done.err
    notes = [line for line in done.err.splitlines() if "scores say nothing of new pictures" in line]
    assert len(notes) == told
    assert all(note.endswith(f"; see: detr data check {place / 'yolo'}") for note in notes)


def test_threads_are_those_of_each_process(place):
    done = detr("train", "toys", *TINY, "--steps", "1", "--devices", "2", "--out", "run", cwd=place)
    assert done.code == 0, done.err
    assert "1 thread in each of 2 processes: " in done.err
