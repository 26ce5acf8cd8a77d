"""Predicting: any number of pictures from anywhere, in order, with bounded memory."""

from __future__ import annotations

import math
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detrcli.errors import ImageError, NonFiniteError, UsageError
from detrcli.predict import run as run_module
from detrcli.predict.result import Result
from detrcli.types import Categories
from tests.spotter import BLUE, RED, Spotter, scatter, scene, spotter


def found(result: Result) -> list[tuple[str, tuple[int, ...]]]:
    return [(d.name, tuple(round(v) for v in d.box)) for d in result.detections]


SPOTS = {("red spot", (20, 30, 80, 90)), ("blue spot", (150, 100, 250, 160))}


def test_boxes_are_pixels_of_the_original_with_the_data_sets_own_ids(tmp_path):
    scene().save(tmp_path / "a.png")
    [result] = spotter().predict(tmp_path / "a.png")
    assert set(found(result)) == SPOTS
    assert {d.category_id for d in result.detections} == {3, 17}
    assert (result.width, result.height) == (320, 240)
    scores = [d.score for d in result.detections]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("kind", ["path", "bytes", "pillow", "array", "tensor"])
def test_everything_that_holds_a_picture_gives_the_same(tmp_path, kind):
    picture = scene()
    path = tmp_path / "a.png"
    picture.save(path)
    sources = {
        "path": path,
        "bytes": path.read_bytes(),
        "pillow": picture,
        "array": np.asarray(picture),
        "tensor": torch.from_numpy(np.array(picture)).permute(2, 0, 1),
    }
    [result] = spotter().predict(sources[kind])
    assert set(found(result)) == SPOTS


def test_a_rotated_photograph_is_seen_as_a_viewer_shows_it(tmp_path):
    picture = scene()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: viewers turn it back by 90 degrees
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "r.png", exif=exif)
    [result] = spotter().predict(tmp_path / "r.png")
    assert (result.width, result.height) == (320, 240)
    assert set(found(result)) == SPOTS


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_order_is_kept_and_batches_are_filled(batch):
    pictures = [scene((100 + 20 * i, 90), ((10, 10, 30 + i, 40, RED),)) for i in range(7)]
    predictor = spotter()
    results = list(predictor.predict(pictures, batch=batch))
    assert [r.width for r in results] == [p.width for p in pictures]
    assert [r.index for r in results] == list(range(7))
    assert [found(r)[0][1][2] for r in results] == pytest.approx([30 + i for i in range(7)], abs=1)
    assert [size[0] for size in predictor.model.sizes] == [batch] * (7 // batch) + (
        [7 % batch] if 7 % batch else []
    )


def test_a_model_that_insists_on_a_batch_size_gets_it_unless_told_otherwise():
    predictor = spotter(only_batch=1)
    list(predictor.predict([scene()] * 2))
    list(predictor.predict([scene()] * 2, batch=2))
    assert [size[0] for size in predictor.model.sizes] == [1, 1, 2]


def test_what_is_kept_can_be_chosen():
    predictor = spotter()
    assert len(next(predictor.predict(scene(), conf=0.999))) == 0
    assert len(next(predictor.predict(scene(), conf=0.0))) == 100
    assert len(next(predictor.predict(scene(), top=1))) == 1
    for wanted in ("RED spot", "3", 3):
        [only] = next(predictor.predict(scene(), classes=[wanted])).detections
        assert only.name == "red spot"
    with pytest.raises(UsageError, match="'red sport'") as caught:  # before anything is looked at
        predictor.predict(scene(), classes=["red sport"])
    assert "red spot" in caught.value.hint
    assert next(predictor.predict(scene(), classes="red spot")).detections[0].name == "red spot"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch", 0), ("conf", 30), ("conf", -0.1), ("conf", math.nan), ("top", -1), ("tile", 0), ("tile", -5), ("max_size", 0),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_at_once(option, value):
    with pytest.raises(UsageError, match=f"{option} must be"):
        spotter().predict(scene(), **{option: value})


def test_a_name_means_the_class_written_so_and_all_classes_of_that_name():
    names = ("Spot", "spot", "spot", "other")
    predictor = replace(spotter(), categories=Categories((1, 2, 5, 9), names))
    assert predictor._labels(["Spot"]) == {0}
    assert predictor._labels("spot") == {1, 2}
    assert predictor._labels(["SPOT"]) == {0, 1, 2}
    assert predictor._labels([9, "5"]) == {2, 3}


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_buffer_may_be_filled_again_as_soon_as_the_next_frame_is_asked_for(kind):
    frames = [np.full((40, 60, 3), value, np.uint8) for value in range(60)]

    def camera():
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer if kind == "array" else torch.from_numpy(buffer).permute(2, 0, 1)
            buffer[:] = 255

    results = list(spotter().predict(camera()))
    assert [int(result.pixels.max()) for result in results] == list(range(60))


def test_reading_in_threads_leaves_the_callers_warnings_alone(tmp_path):
    scene().save(tmp_path / "a.png")
    before = list(warnings.filters)
    for _ in spotter().predict([tmp_path / "a.png"] * 60):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
    assert list(warnings.filters) == before


def test_a_model_without_an_answer_left_says_so():
    """It has a hundred; more objects than that have none, and nobody could tell from the result."""
    crowd = scene((320, 240), scatter((320, 240), 110, 8))
    [few], [many] = spotter().predict(scene()), spotter().predict(crowd)
    assert not few.notes
    assert len(many) == 100
    [note] = many.notes
    assert "all 100 answers" in note
    assert "--tile" in note
    assert note in many.to_dict()["notes"]
    one_class = next(spotter().predict(crowd, classes=["red spot"], top=5))
    assert one_class.notes == many.notes
    assert not next(spotter().predict(crowd, conf=0)).notes  # every answer counts: nothing can be said
    tiled = list(spotter().predict([crowd, scene()], tile=128))
    assert len(tiled[0]) == 110
    assert not tiled[1].notes


def test_the_size_that_the_model_sees_can_be_limited():
    predictor = spotter()
    list(predictor.predict(scene(), max_size=160))
    assert max(predictor.model.sizes[0][2:]) == 160


def test_a_bad_picture_raises_or_is_told_and_passed_over(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    sources = [scene(), tmp_path / "bad.png", scene()]
    with pytest.raises(ImageError, match=r"bad\.png"):
        list(spotter().predict(sources))
    told = []
    results = list(spotter().predict(sources, on_failure=told.append))
    assert [r.index for r in results] == [0, 2]
    assert [(f.index, f.source) for f in told] == [(1, str(tmp_path / "bad.png"))]


def test_inputs_are_taken_only_a_little_ahead_of_the_model():
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield scene((64, 64), ())

    results = spotter().predict(endless())
    for _ in range(5):
        next(results)
    time.sleep(0.3)
    assert len(taken) <= 5 + 2 + 2 + run_module.READERS
    results.close()


def test_a_result_comes_before_the_next_input_is_known():
    """A camera or another program may think long between two names."""
    release = threading.Event()

    def slow():
        yield scene()
        release.wait(20)
        yield scene()

    results = spotter().predict(slow())
    assert set(found(next(results))) == SPOTS
    release.set()
    assert len(list(results)) == 1


def test_what_the_callers_own_iterator_raises_is_the_callers():
    def breaks():
        yield scene()
        raise KeyError("mine")

    results = spotter().predict(breaks())
    next(results)
    with pytest.raises(KeyError, match="mine"):
        next(results)


def test_reader_threads_end_when_the_caller_stops_early():
    before = {t.name for t in threading.enumerate()}
    results = spotter().predict([scene()] * 50)
    next(results)
    results.close()
    deadline = time.monotonic() + 5
    while {t.name for t in threading.enumerate()} - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not {t.name for t in threading.enumerate()} - before


@pytest.mark.parametrize("broken", ["logits", "boxes"])
def test_a_diverged_model_is_named_and_does_not_find_nothing(broken):
    class Diverged(Spotter):
        def forward(self, images, mask=None):
            output = super().forward(images, mask)
            return replace(output, **{broken: torch.full_like(getattr(output, broken), torch.nan)})

    with pytest.raises(NonFiniteError, match="answer for image-1 is NaN") as caught:
        next(spotter(model=Diverged().eval()).predict(scene()))
    assert "diverged" in caught.value.hint


def test_half_precision_finds_the_same():
    [result] = spotter(model=Spotter().eval()).predict(scene(), amp=True)
    assert set(found(result)) == SPOTS


def test_boxes_never_leave_the_picture():
    [result] = spotter().predict(scene((240, 240), ((160, 160, 330, 330, BLUE),)))
    assert found(result) == [("blue spot", (160, 160, 240, 240))]


def test_coco_rows_hold_corner_and_size():
    [result] = spotter().predict(scene(), classes=["red spot"])
    [row] = result.to_coco(42)
    assert row["image_id"] == 42
    assert row["category_id"] == 3
    assert row["bbox"] == pytest.approx([20, 30, 60, 60], abs=0.5)
