"""Settings as TOML: what is written comes back, flags win, a mistake has its line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detrcli import toml
from detrcli.errors import CheckpointError, UsageError
from detrcli.plugins import models, resolve
from detrcli.train import settings
from detrcli.train.plan import Request, make_plan
from tests.cli.run import detr
from tests.tiny import write_run

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=10,
)


@given(st.dictionaries(texts, values))
def test_what_is_written_is_read_back(table):
    assert tomllib.loads(toml.dumps(table)) == table


def test_none_is_spelled_and_half_a_letter_is_refused():
    assert toml.dumps({"a": None}) == 'a = "none"\n'
    with pytest.raises(UsageError, match="half a letter"):
        toml.dumps({"a": "x\udcffy"})


def plan(model="detr/tiny", **changes):
    return make_plan(Request(data='da"ta\n', model=model, device="cpu", **changes))


@pytest.mark.parametrize("model", [m.name for m in models()])
def test_a_plan_comes_back_from_its_file(model, tmp_path):
    batch = plan(model).recipe.batch_size
    ours = plan(
        model, epochs=7, seed=3, workers=2, steps=9, device_batch=max(1, batch // 2), eval_every=2, log=("wandb",),
        weights="a file", data_root="/da ta", lr=3e-5, changes={"recipe.clip_norm": 1, "recipe.lr_factors.x": 0.5},
    )  # fmt: skip
    file = tmp_path / "config.toml"
    file.write_text(settings.write(file, ours, as_begun=True), encoding="utf-8")
    assert make_plan(settings.over(settings.read(file), {})) == ours


def write(folder, text):
    (folder / "my.toml").write_text(text)
    return folder / "my.toml"


def test_flags_win_over_the_file(tmp_path):
    file = write(
        tmp_path,
        'data = "a"\nmodel = "detr/tiny"\nepochs = 50\nlr = 0.5\nseed = 7\ndevice = "cpu"\n'
        '[set.recipe]\nschedule = "step"\nlr_drop = 40\nbatch_size = 8\n[set.model]\nnum_queries = 9\n',
    )
    alone = make_plan(settings.over(settings.read(file), {}))
    assert (alone.data, alone.seed, alone.recipe.epochs, alone.recipe.lr) == ("a", 7, 50, 0.5)
    assert (alone.recipe.batch_size, alone.recipe.lr_drop, alone.config.num_queries) == (8, 40, 9)
    flags = {"data": "b", "lr": 0.25, "batch_size": 4, "epochs": 25, "changes": {"model.num_queries": 5}}
    over = make_plan(settings.over(settings.read(file), flags))
    assert (over.data, over.seed, over.recipe.lr, over.recipe.batch_size) == ("b", 7, 0.25, 4)
    assert (over.recipe.epochs, over.recipe.drops, over.config.num_queries) == (25, (20,), 5)


def test_a_part_of_a_nested_setting_leaves_the_rest(tmp_path):
    file = write(
        tmp_path, 'data = "a"\nmodel = "detr/tiny"\ndevice = "cpu"\n[set.model.backbone]\ndilated = true\n'
    )
    ours, before = make_plan(settings.over(settings.read(file), {})).config, plan().config
    assert ours.backbone.dilated
    assert ours.backbone.name == before.backbone.name


@pytest.mark.parametrize(
    ("text", "line", "says", "hints"),
    [
        ('data = "x"\n\nseeed = 1\n', 3, "unknown setting 'seeed'", "seed"),
        ('seed = "a"\n', 1, "seed needs a whole number", "seed=3"),
        ("epochs = 0\n", 1, "epochs must be at least 1", ""),
        ("workers = 0\nseed = -1\n", 2, "seed must be at least 0 (value given: -1)", ""),
        ("seed = 9223372036854775808\n", 1, "seed must be at most", ""),
        ("workers = -1\n", 1, "workers must be at least 0", ""),
        ("lr = -0.1\n", 1, "lr must be at least 0", ""),
        ("save_every = nan\n", 1, "save_every must be at least 0 (value given: nan)", ""),
        ('model = "detr/tiny"\n[set.recipe]\nbatch_size = 0\n', 3, "recipe.batch_size must be at least 1", ""),
        ('model = "deter/tiny"\n', 1, "unknown model", "detr"),
        ('model = "detr/tiny"\n[set.model]\n# why\nnum_quereis = 3\n', 4, "model.num_quereis", "model.num_queries"),
        ('model = "detr/tiny"\n[set.recipe]\nlr = "fast"\n', 3, "recipe.lr needs a number", "recipe.lr=0.1"),
        ('model = "detr/tiny"\n[set.model.backbone]\n"nam" = "x"\n', 3, "model.backbone.nam", "model.backbone.name"),
        ('model = "detr/tiny"\nset.recipe.lr = "fast"\n', 2, "recipe.lr needs a number", ""),
        ("[set.recip]\nlr = 1\n", 1, "set.recip", "set.recipe"),
        ("set = 3\n", 1, "set needs a table", "[set.recipe]"),
        ('amp = "fp8"\n', 1, "amp", "fp16"),
        ('log = ["paper"]\n', 1, "'paper'", "tensorboard"),
        ("changes = {}\n", 1, "'changes'", ""),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_has_its_line(text, line, says, hints, tmp_path):
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        settings.read(file)
    assert caught.value.message.startswith(f"{file}:{line}: ")
    assert says in caught.value.message
    assert hints in (caught.value.hint or "")


def test_what_is_no_toml_says_where(tmp_path):
    with pytest.raises(UsageError, match="at line 2"):
        settings.read(write(tmp_path, "seed = 1\n{{{\n"))
    with pytest.raises(UsageError, match="cannot read"):
        settings.read(tmp_path / "absent.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not TOML"):
        settings.read(tmp_path / "x.toml")


def test_settings_of_one_model_are_not_given_to_another(tmp_path):
    file = write(tmp_path, 'data = "a"\nmodel = "detr/tiny"\n[set.model]\nnum_queries = 9\n')
    with pytest.raises(UsageError, match="for detr/tiny, not for"):
        settings.over(settings.read(file), {"model": "lite_deformable/tiny"})


def test_the_command_needs_data_and_model_from_somewhere(tmp_path):
    file = write(tmp_path, 'model = "detr/tiny"\n')
    assert "needs data and a model" in detr("train", "--config", file).error(2)
    assert "my.toml:1: " in detr("train", "shapes", "--config", write(tmp_path, "sed = 1\n")).error(2)


def test_a_bare_family_is_the_row_that_its_weights_are_of(tmp_path):
    """As for prediction: the file says, or the user is asked; weights of another family leave the default."""

    def planned(model, weights):
        return make_plan(Request(data="shapes", model=model, weights=str(weights), device="cpu")).model

    ours, theirs = write_run(tmp_path / "dino", "lite_dino/tiny"), write_run(tmp_path / "other", "dino/tiny")
    assert planned("lite_dino", ours) == "lite_dino/tiny"
    assert planned("lite_dino", theirs) == resolve("lite_dino").name
    assert planned("lite_dino/h2l2-2x3", ours) == "lite_dino/h2l2-2x3"
    silent = tmp_path / "official.pth"
    torch.save({"model": {"x": torch.zeros(1)}}, silent)
    with pytest.raises(CheckpointError, match="does not say which row") as asked:
        planned("lite_dino", silent)
    assert "name the row: --model one of lite_dino/h3l1-2x3" in asked.value.hint
    assert planned("lite_dino/h3l1-2x3", silent) == "lite_dino/h3l1-2x3"
    assert planned("deformable_detr", silent) == resolve("deformable_detr").name


def test_how_threads_wait_is_set_before_torch_reads_it():
    code = (
        "import os, sys; from detrcli.cli import main, train;"
        "train._request = lambda *a: sys.exit('torch' in sys.modules or os.environ['GOMP_SPINCOUNT'] != '1000');"
        "sys.argv = ['detr', 'train', 'shapes']; main()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
