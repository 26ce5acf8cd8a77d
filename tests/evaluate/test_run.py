"""Evaluating a model: every image once, the same numbers however the work is dealt out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detrcli import launch
from detrcli.data.loader import eval_loader
from detrcli.errors import DataError, DetrError, NonFiniteError, UsageError
from detrcli.evaluate import coco, report
from detrcli.evaluate import run as run_module
from detrcli.evaluate.run import evaluate, match_categories
from detrcli.postprocess import sigmoid_topk
from detrcli.types import Categories, Output
from tests.evaluate.conftest import painted
from tests.spotter import CATEGORIES, PREPROCESS, Spotter


def run(dataset, model=None, **options):
    return evaluate(model or Spotter(), dataset, preprocess=PREPROCESS, postprocess=sigmoid_topk, **options)


def same(a, b) -> bool:
    names = ("image_ids", "category_ids", "scores", "boxes")
    return a.metrics == b.metrics and all(
        np.array_equal(getattr(a.detections, n), getattr(b.detections, n)) for n in names
    )


def test_a_model_that_finds_everything_scores_high(dataset):
    result = run(dataset)
    assert result.metrics["ap50"] == pytest.approx(1)
    assert result.metrics["ap"] > 0.8
    assert result.images == len(dataset)
    assert result.images_per_second > 0
    assert set(result.detections.category_ids.tolist()) <= set(CATEGORIES.ids)
    order = list(dict.fromkeys(result.detections.image_ids.tolist()))
    assert order == [i for i in dataset.annotations.image_ids.tolist() if i in order]


def test_the_batch_size_does_not_change_a_model_that_masks(dataset):
    one, three = run(dataset), run(dataset, batch_size=3)
    assert one.metrics == pytest.approx(three.metrics, abs=1e-6)


def test_a_limit_takes_the_first_images(dataset):
    result = run(dataset, limit=3)
    assert result.images == 3
    assert set(result.detections.image_ids.tolist()) <= set(dataset.annotations.image_ids[:3].tolist())


def test_progress_and_mode_are_kept(dataset):
    model, told = Spotter().train(), []
    run(dataset, model, batch_size=3, advance=told.append)
    assert told == [3, 3, 1]
    assert model.training


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_whole_batches_are_dealt_out_once_each(dataset, ranks):
    """Nine ranks are more than there are batches: some have nothing to do."""
    shares = [
        [
            batch.image_ids
            for batch in eval_loader(dataset, PREPROCESS, batch_size=2, rank=r, world_size=ranks)
        ]
        for r in range(ranks)
    ]
    dealt = [batch for share in shares for batch in share]
    alone = [batch.image_ids for batch in eval_loader(dataset, PREPROCESS, batch_size=2)]
    assert sorted(dealt) == sorted(alone)
    assert sorted(i for batch in dealt for i in batch) == sorted(dataset.annotations.image_ids.tolist())


def _share(seed):
    torch.set_num_threads(1)
    return run(painted(seed=seed), batch_size=2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_give_the_same_numbers_and_detections(ranks):
    assert same(launch.on_ranks(ranks, _share, 4), run(painted(seed=4), batch_size=2))


def _fails():
    raise DataError("nothing to see", hint="look elsewhere")


def test_an_error_in_a_process_arrives_as_it_is():
    with pytest.raises(DataError, match="nothing to see") as caught:
        launch.on_ranks(1, _fails)
    assert caught.value.hint == "look elsewhere"


def test_any_error_of_scoring_is_told_to_the_other_ranks(dataset, monkeypatch):
    def score(*_, **__):
        raise DetrError("short of memory")

    told = []
    monkeypatch.setattr(run_module, "score", score)
    monkeypatch.setattr(run_module, "_gather", lambda mine: [mine])
    monkeypatch.setattr(run_module.distributed, "running", lambda: True)
    monkeypatch.setattr(run_module.distributed, "world_size", lambda: 1)
    monkeypatch.setattr(run_module.distributed, "rank", lambda: 0)
    monkeypatch.setattr(run_module.dist, "broadcast_object_list", told.extend)
    with pytest.raises(DetrError, match="short of memory") as caught:
        run(dataset, limit=1)
    assert told == [caught.value]


def test_a_scorer_that_is_not_there_is_told_before_an_image_is_seen(dataset, monkeypatch):
    model = Spotter()
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="ultrafast scorer is not installed"):
        run(dataset, model, backend="ultrafast")
    assert model.sizes == []


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full, on this system"
)
@pytest.mark.parametrize("name", [report.METRICS_FILE, report.CLASSES_FILE, f"{report.DETECTIONS_FILE}.part"])
def test_a_full_disk_is_said(dataset, tmp_path, name):
    result = run(dataset, limit=2)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(DetrError, match=f"cannot write in {tmp_path}: No space left") as caught:
        report.write(tmp_path, result.coco, result.detections, {})
    assert "free some space" in caught.value.hint


def test_classes_are_matched_by_name_and_unknown_ones_left_out(dataset):
    known = Categories((0, 1, 2), ("cat", "Blue Spot", "red spot"))
    assert match_categories(known, CATEGORIES).tolist() == [-1, 17, 3]
    assert match_categories(CATEGORIES, CATEGORIES).tolist() == [3, 17]
    swapped = run(dataset, categories=Categories((8, 9), ("blue spot", "red spot")))
    assert swapped.metrics["ap50"] < 0.2
    only_red = run(dataset, categories=Categories((8, 9), ("red spot", "cat")))
    assert set(only_red.detections.category_ids.tolist()) == {3}


def test_classes_that_the_model_lacks_are_told(dataset):
    assert not run(dataset, limit=3).coco.notes
    result = run(dataset, categories=Categories((8, 9), ("red spot", "blue dot")))
    blue = result.coco.classes[1]
    assert blue.metrics["ap"] == 0
    [note] = result.coco.notes
    assert f"1 of the data's 2 classes, with {blue.objects} objects" in note
    assert f"score 0: blue spot ({blue.objects}); it knows and the data has not: blue dot" in note


def test_a_model_of_other_classes_is_refused(dataset):
    with pytest.raises(DataError, match="no class in common"):
        run(dataset, categories=Categories((1, 2), ("cat", "dog")))


class Diverged(nn.Module):
    def forward(self, images, mask=None):
        return Output(torch.full((len(images), 5, 2), float("nan")), torch.full((len(images), 5, 4), 0.5))


def test_a_diverged_model_is_named_not_scored(dataset):
    with pytest.raises(NonFiniteError, match="image"):
        run(dataset, Diverged())


def test_half_precision_reaches_the_model_and_leaves_full_precision(dataset):
    seen = []

    class Layered(Spotter):
        def forward(self, images, mask=None):
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            output = super().forward(images, mask)
            return replace(output, logits=output.logits.bfloat16())

    result = run(dataset, Layered(), amp=True, limit=2)
    assert seen[0] == torch.bfloat16
    assert result.detections.scores.dtype == np.float64
