"""Which weights a name means: the user's word, the newest run, the declaration, or an error with three ways on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detrcli import runs
from detrcli.errors import CheckpointError, ModelError, UsageError
from detrcli.weights.file import save
from detrcli.weights.hub import Reference
from detrcli.weights.metadata import Metadata
from detrcli.weights.resolve import choose


def run(name: str, model: str, finished_at: str, status: str = "finished", weights: str = "best") -> Path:
    folder = runs.root("train") / name
    folder.mkdir(parents=True)
    table = {"status": status, "model": model, "finished_at": finished_at}
    (folder / "run.json").write_text(json.dumps(table))
    if weights:
        save(folder / f"{weights}.safetensors", {"w": torch.zeros(1)}, Metadata(model=model, num_classes=3))
    return folder


def test_the_newest_finished_run_comes_first():
    run("a", "detr/tiny", "2026-01-01")
    newest = run("b", "detr/tiny", "2026-03-01")
    run("c", "detr/tiny", "2026-02-01")
    run("d", "detr/tiny", "2026-09-09", status="interrupted")
    run("e", "detr/tiny", "2026-09-09", weights="")
    choice = choose("detr/tiny")
    assert choice.source == newest / "best.safetensors"
    assert "newest finished run" in choice.why


def test_a_family_alone_means_any_of_its_variants():
    folder = run("a", "detr/tiny", "2026-01-01")
    choice = choose("detr")
    assert (choice.model.name, choice.source) == ("detr/tiny", folder / "best.safetensors")
    assert isinstance(choose("detr/r50").source, Reference)


def test_a_run_without_a_best_checkpoint_gives_its_last():
    folder = run("a", "detr/tiny", "2026-01-01", weights="last")
    assert choose("detr/tiny").source == folder / "last.safetensors"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "finished"}', '{"status": 3, "model": []}'])
def test_records_that_cannot_be_read_are_passed_over(content: str):
    folder = run("broken", "detr/tiny", "2026-09-09")
    (folder / "run.json").write_text(content)
    good = run("good", "detr/tiny", "2026-01-01")
    assert choose("detr/tiny").source == good / "best.safetensors"


def test_runs_of_models_that_are_gone_are_passed_over():
    run("gone", "no_such_model/v1", "2026-09-09")
    good = run("good", "detr/tiny", "2026-01-01")
    assert choose("detr").source == good / "best.safetensors"


def test_declared_weights_come_second_with_their_licence():
    choice = choose("detr")
    assert choice.source == Reference(
        "facebook/detr-resnet-50", None, "model.safetensors", None, choice.source.provenance
    )
    assert "apache-2.0" in choice.why


def test_no_weights_is_an_error_with_the_three_ways_on():
    with pytest.raises(ModelError, match="no weights for detr/tiny") as none:
        choose("detr/tiny")
    assert none.value.exit_code == 4
    assert all(way in (none.value.hint or "") for way in ("detr train", "detr zoo convert", "--weights"))


def test_weights_may_be_a_file_a_folder_or_the_name_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = run("mine", "detr/tiny", "2026-01-01", status="interrupted")
    best = folder / "best.safetensors"
    assert choose(None, str(best)).source == best
    assert choose(None, str(folder)).source == best
    assert choose("detr", "mine").source == best
    assert choose(None, "mine").model.name == "detr/tiny"


def test_weights_of_another_model_are_refused():
    best = run("mine", "detr/tiny", "2026-01-01") / "best.safetensors"
    with pytest.raises(CheckpointError, match="holds detr/tiny, not detr/r50"):
        choose("detr/r50", str(best))


def test_a_file_of_ours_is_known_by_its_content_not_by_its_name(tmp_path: Path):
    best = run("mine", "detr/tiny", "2026-01-01") / "best.safetensors"
    renamed = best.rename(tmp_path / "w.bin")
    assert choose(None, str(renamed)).model.name == "detr/tiny"


def test_a_file_or_folder_given_as_the_model_is_told_its_option():
    folder = run("mine", "detr/tiny", "2026-01-01")
    for place in (folder, folder / "best.safetensors"):
        with pytest.raises(UsageError) as told:
            choose(str(place))
        assert told.value.hint == f"use --weights {place}"


def test_a_foreign_file_needs_a_model(tmp_path: Path):
    (tmp_path / "w.pth").write_bytes(b"PK")
    with pytest.raises(UsageError, match="does not say which model"):
        choose(None, str(tmp_path / "w.pth"))
    assert choose("detr/r50", str(tmp_path / "w.pth")).model.name == "detr/r50"


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file"),
    [
        ("owner/repo", "owner/repo", None, None),
        ("owner/repo@main", "owner/repo", "main", None),
        ("owner/repo@refs/pr/3:a/b.safetensors", "owner/repo", "refs/pr/3", "a/b.safetensors"),
        ("Owner_1/re.po-2:x.bin", "Owner_1/re.po-2", None, "x.bin"),
    ],
)
def test_hub_references_are_read(text: str, repo: str, revision: str | None, file: str | None):
    reference = choose("detr", text).source
    assert reference == Reference(repo, revision, file)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    [
        "owner/repo:../x",
        "owner/repo@../../x",
        "owner/repo:/etc/passwd",
        "a/b/c",
        "nothing",
        "owner/",
        "/repo",
    ],
)
def test_what_is_no_reference_is_told_with_the_form(text: str):
    with pytest.raises(UsageError, match="neither a file, a run nor a Hub reference") as error:
        choose("detr", text)
    assert "owner/repo@revision:file" in (error.value.hint or "")


def test_a_file_name_that_does_not_exist_is_not_taken_for_a_repository():
    with pytest.raises(CheckpointError, match="there is no file"):
        choose("detr", "weights/best.safetensors")


def test_neither_model_nor_weights():
    with pytest.raises(UsageError, match="neither a model nor weights"):
        choose(None)
