"""What a run can be asked for, and that each wish survives a stop: averaged weights, 16 bits, freezing, an end when nothing improves."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detrcli import runs
from detrcli.cli.live import Facts
from detrcli.config import to_plain
from detrcli.data.loader import Samples
from detrcli.errors import CheckpointError, DataError, DetrError, NonFiniteError, UsageError
from detrcli.plugins import resolve
from detrcli.train import estimate, guard, machine, run, state
from detrcli.train import job as jobs
from detrcli.train.ema import Average
from detrcli.train.job import assemble
from detrcli.train.plan import Request, make_plan
from detrcli.train.record import read_plan
from detrcli.train.run import train
from detrcli.train.thrift import freeze, recompute
from tests.cli.run import detr
from tests.tiny import write_run
from tests.train.conftest import Watch, losses, only_one_fits

STOP = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731


def stopped_and_resumed(request, folder, at=6):
    halved = train(request, out=folder, watch=Watch(at, STOP))
    assert halved.stopped_by == signal.SIGTERM
    assert halved.steps == at + 1
    return train(Request(), resume=folder)


def same_state(one, other):
    ours, theirs = state.read(one), state.read(other)
    ours.pop("machine"), theirs.pop("machine")
    return state.digest(ours) == state.digest(theirs)


@pytest.mark.parametrize(
    "wish",
    [
        {"ema": 0.9},
        {"amp": "bf16"},
        {"amp": "fp16", "freeze": ("backbone",)},
        {"device_batch": 2},
        {"group_by_aspect": True, "workers": 2},
        {"freeze": ("backbone",), "checkpointing": True},
        {"model": "lite_dino/tiny"},
        {"patience": 5, "eval_every": 2},
    ],
    ids=lambda wish: " ".join(wish),
)
def test_every_wish_survives_a_stop_to_the_bit(ask, tmp_path, wish):
    straight = train(ask(**wish), out=tmp_path / "straight")
    resumed = stopped_and_resumed(ask(**wish), tmp_path / "halved")
    assert losses(straight.folder) == losses(resumed.folder)
    assert same_state(straight.folder, resumed.folder)
    assert straight.metrics == resumed.metrics
    for name in ("best.safetensors", "last.safetensors"):
        assert (straight.folder / name).read_bytes() == (resumed.folder / name).read_bytes()


@pytest.mark.parametrize("at", [4, 9], ids=["at the end of an epoch", "after the last step"])
def test_a_stop_before_the_score_leaves_the_score_to_the_next(ask, tmp_path, at):
    straight = train(ask(), out=tmp_path / "straight")
    resumed = stopped_and_resumed(ask(), tmp_path / "halved", at)
    assert json.loads((tmp_path / "halved" / "run.json").read_text())["status"] == "finished"
    assert same_state(straight.folder, resumed.folder)
    assert straight.metrics == resumed.metrics


def test_a_run_that_its_steps_end_goes_on_as_if_they_had_not(ask, tmp_path):
    """The rate falls over the epochs of the recipe, wherever `steps` stop it."""
    wish = {"changes": {"recipe.warmup_steps": 0}}
    straight = train(ask(**wish), out=tmp_path / "straight")
    assert train(ask(steps=7, **wish), out=tmp_path / "halved").steps == 7
    resumed = train(Request(steps=10), resume=tmp_path / "halved")
    assert losses(straight.folder) == losses(resumed.folder)
    assert same_state(straight.folder, resumed.folder)
    assert straight.metrics == resumed.metrics
    names = [folder / "last.safetensors" for folder in (straight.folder, resumed.folder)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_signal_asks_for_a_state_and_the_run_goes_on(ask, tmp_path):
    """SIGUSR1, which schedulers send before they end a job."""
    kept = {}

    class Look(Watch):
        def step(self, step):
            super().step(step)
            kept[step.number] = (
                state.read(tmp_path / "run")["step"] if state.exists(tmp_path / "run") else None
            )

    done = train(
        ask(epochs=1), out=tmp_path / "run", watch=Look(1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    )
    assert kept == {0: None, 1: None, 2: 2, 3: 2, 4: 2}
    assert done.steps == 5
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def listed_otherwise(folder, names):
    """The classes of val with other ids, in the order of the names; what has none keeps its place under a name of its own."""
    path = folder / "annotations" / "instances_val.json"
    document = json.loads(path.read_text())
    old = {row["id"]: row["name"] for row in document["categories"]}
    new = {name: 10 + place for place, name in enumerate(names)}
    document["categories"] = [{"id": key, "name": name} for name, key in new.items()]
    for row in document["annotations"]:
        row["category_id"] = new.get(old[row["category_id"]], 10)
    path.write_text(json.dumps(document))


@pytest.fixture
def copied(shapes, tmp_path):
    return Path(shutil.copytree(shapes, tmp_path / "copied"))


def test_scores_in_training_are_those_of_the_same_classes(ask, shapes, copied, tmp_path):
    """Whatever val calls them by: ids and order are matched by name, and what is new there is told."""

    class Look(Watch):
        def evaluated(self, step, result, best):
            names = dict(zip(self.job.val.categories.ids, self.job.val.categories.names, strict=True))
            self.found = [names[key] for key in result.detections.category_ids.tolist()]
            self.metrics = result.metrics

    listed_otherwise(copied, ["triangle", "blob", "circle", "square"])
    one, other = Look(), Look()
    train(ask(steps=1), out=tmp_path / "one", watch=one)
    train(ask(steps=1, data=str(copied)), out=tmp_path / "other", watch=other)
    assert one.found
    assert one.found == other.found
    assert one.metrics == pytest.approx(other.metrics)
    assert "val: 1 x a split lists other classes than train" in " ".join(other.job.notes)


def test_classes_that_train_does_not_list_are_told_before_it_begins(ask, copied, tmp_path):
    listed_otherwise(copied, ["blob", "circle"])
    assert "objects of a class that train does not list" in " ".join(
        assemble(make_plan(ask(data=str(copied)))).notes
    )
    listed_otherwise(copied, ["blob"])
    with pytest.raises(DataError, match="no class in common"):
        train(ask(data=str(copied)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_averaged_weights_are_those_that_are_scored_and_kept(ask, tmp_path):
    watch = Watch()
    done = train(ask(ema=0.9, epochs=1), out=tmp_path / "run", watch=watch)
    average, plain = watch.job.average.model.state_dict(), watch.job.net.state_dict()
    kept = load_file(done.folder / "last.safetensors")
    assert all(torch.equal(kept[name], average[name]) for name in kept)
    assert not all(torch.equal(kept[name], plain[name]) for name in kept)


def test_an_average_follows_its_formula():
    model = torch.nn.Linear(2, 1)
    average, wanted = Average(model, 0.5), model.weight.detach().clone()
    for n in range(12):
        with torch.no_grad():
            model.weight.add_(1)
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
        average.update(model)
    assert torch.allclose(average.model.weight, wanted)


def test_fp16_lowers_its_scale_when_gradients_overflow(ask, tmp_path):
    def overflow():
        watch.before = {n: v.clone() for n, v in watch.job.net.state_dict().items()}
        watch.job.trainer.scaler.update(2.0**60)

    def look(step):
        if step.number == 3:
            after = watch.job.net.state_dict()
            watch.kept = all(torch.equal(watch.before[n], after[n]) for n in after)
        Watch.step(watch, step)

    watch = Watch(2, overflow)
    watch.step = look
    train(ask(amp="fp16", epochs=1), out=tmp_path / "run", watch=watch)
    assert watch.kept  # a step that overflowed is not taken
    assert state.read(tmp_path / "run")["scaler"]["scale"] < 2.0**60


def test_fp16_may_be_taken_up_on_the_way_and_ends_where_no_scale_helps(ask, tmp_path):
    """The scale of a run that had none begins anew. A gradient that stays NaN however low the scale is ends the run."""
    folder, watch = tmp_path / "run", Watch()
    train(ask(), out=folder, watch=Watch(0, STOP))

    def spoil():
        watch.job.trainer.scaler.update(2.0)
        next(watch.job.net.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    watch.at, watch.do = 1, spoil
    with pytest.raises(NonFiniteError, match=r"step 4 .*the gradient; the loss is \d") as caught:
        train(Request(amp="fp16"), resume=folder, allow_change=["amp"], watch=watch)
    assert "--amp off --allow-change amp" in caught.value.hint
    assert state.read(folder)["step"] == 4
    assert train(Request(amp="off", steps=6), resume=folder, allow_change=["amp"]).steps == 6


def test_a_gradient_that_overflowed_has_no_norm_in_the_record(ask, tmp_path):
    """Every line is JSON, and everything that reads them goes on."""
    watch = Watch(
        1, lambda: watch.job.trainer.scaler.update(2.0)
    )  # with the scale that it begins with, all do
    run = train(ask(amp="fp16", epochs=1), out=tmp_path / "run", watch=watch).folder

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    rows = [
        json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["grad_norm"] is None for row in rows if "loss" in row] == [True, True, False, False, False]
    assert len(runs.find(run).history().curve("grad_norm")[1]) == 3
    assert (
        detr("runs", "show", run, "--html", tmp_path / "page.html", "--png", tmp_path / "curves.png").code
        == 0
    )
    assert detr("runs", "compare", run, run).code == 0
    with (run / "steps.csv").open(newline="") as file:
        assert [row["grad_norm"] == "" for row in csv.DictReader(file)] == [True, True, False, False, False]


def test_a_warm_up_that_is_long_for_the_run_is_told(ask):
    def told(**changes):
        notes = assemble(make_plan(ask(**changes))).notes
        return [note for note in notes if "the rate rises" in note]

    assert told(changes={"recipe.warmup_steps": 1000}) == [
        "the rate rises in the first 1000 steps; the run has 10, and the last has 1% of the rate: "
        "better --set recipe.warmup_steps=0"
    ]
    assert told(epochs=8, changes={"recipe.warmup_steps": 9}) == [
        "the rate rises in the first 9 steps; the run has 40: better --set recipe.warmup_steps=2"
    ]
    assert told(epochs=8, changes={"recipe.warmup_steps": 8}) == []


def test_losses_and_boxes_are_computed_in_full_precision(ask):
    job = assemble(make_plan(ask(amp="fp16")))
    (parts, *_) = job.loader.steps(0)
    seen = []
    criterion = job.trainer.learner.learner.criterion
    original = type(criterion).layer_losses

    def look(self, logits, boxes, *rest, **more):
        seen.append((logits.dtype, boxes.dtype, torch.is_autocast_enabled("cpu")))
        return original(self, logits, boxes, *rest, **more)

    type(criterion).layer_losses = look
    try:
        job.trainer.step(parts, 0, 0, 1.0)
    finally:
        type(criterion).layer_losses = original
    assert seen == [(torch.float32, torch.float32, False)]


def test_patience_ends_a_run_that_does_not_improve(ask, tmp_path):
    watch = Watch()
    done = train(ask(epochs=9, lr=0.0, patience=2), out=tmp_path / "run", watch=watch)
    assert len(watch.scores) == 3  # the first, and two that are no better
    assert done.steps == 15
    assert done.stopped_by is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    again = train(Request(), resume=tmp_path / "run")  # and stays ended
    assert again.steps == 15
    assert (
        again.because
        == done.because
        == "ended at step 15 of 45: no better AP in 2 evaluations (--patience 2)"
    )


def test_settings_that_changed_on_the_way_are_not_called_those_of_the_run(ask, tmp_path):
    folder, config = tmp_path / "run", tmp_path / "run" / "config.toml"
    first = train(ask(steps=1), out=folder)
    assert first.because is None
    complete = train(Request(workers=0), resume=folder)
    assert complete.because == "nothing was left to do at step 1 of 1; for more: --steps N"
    train(Request(steps=2), resume=folder)
    assert "to the same numbers" in config.read_text()
    train(Request(steps=3, batch_size=2), resume=folder, allow_change=["batch-size"])
    assert "It began with others" in config.read_text()
    train(Request(steps=4), resume=folder)
    assert "It began with others" in config.read_text()
    with pytest.raises(UsageError, match="weights = None, which cannot become"):
        train(Request(weights=str(folder)), resume=folder, allow_change=["weights"])


def test_a_score_where_the_steps_end_does_not_try_patience(ask, tmp_path):
    """A run that was never stopped has none there."""
    wish = ask(epochs=9, lr=0.0, patience=1, steps=7)
    assert train(wish, out=tmp_path / "run").steps == 7
    assert train(Request(steps=45), resume=tmp_path / "run").steps == 10


def test_frozen_parts_stay_as_they_are(ask, tmp_path):
    watch = Watch()
    before = assemble(make_plan(ask())).net.state_dict()
    train(ask(freeze=("backbone", r"class_(head|embed)"), epochs=1), out=tmp_path / "run", watch=watch)
    after = watch.job.net.state_dict()
    frozen = {n for n, p in watch.job.net.named_parameters() if not p.requires_grad}
    assert any(n.startswith("backbone") for n in frozen)
    assert all(torch.equal(before[n], after[n]) for n in frozen)
    assert not all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("names", [("nek",), ("",), ("(",)])
def test_freezing_nothing_or_everything_is_refused(names):
    model = resolve("detr/tiny")
    with pytest.raises(UsageError, match="--freeze"):
        freeze(model.build(3), model, names)


@pytest.mark.parametrize("name", ["detr/tiny", "lite_dino/tiny", "dynamic_detr/tiny", "d2etr/tiny"])
def test_what_is_computed_twice_comes_out_the_same(ask, name):
    one, other = (assemble(make_plan(ask(model=name, checkpointing=c))) for c in (False, True))
    assert recompute(resolve(name).build(3), resolve(name)) >= 3
    for job in (one, other):
        job.net.train()
        (parts, *_) = job.loader.steps(0)
        job.trainer.step(parts, 0, 0, 1.0)
    pairs = zip(one.net.parameters(), other.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_computing_twice_keeps_less():
    """Counted in what autograd holds, not in what the process does."""

    def held(net):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            net(torch.zeros(1, 3, 64, 64))
        return total

    model = resolve("deformable_detr/tiny")
    net = model.build(3).train()
    plain = held(net)
    recompute(net, model)
    assert held(net) < 0.6 * plain


def test_settings_of_a_resumed_run_are_kept_or_changed_knowingly(ask, tmp_path):
    folder = tmp_path / "run"
    train(ask(), out=folder, watch=Watch(6, STOP))
    train(ask(steps=8, workers=1), resume=folder)  # the same again; what changes no number may be otherwise
    with pytest.raises(UsageError, match=r"started with lr = 0\.\d+, and 0\.5 was asked") as caught:
        train(Request(lr=0.5), resume=folder)
    assert "--allow-change lr" in caught.value.hint
    with pytest.raises(UsageError, match=r"model\.num_queries = \d+, which cannot become"):
        train(Request(changes={"model.num_queries": 7}), resume=folder, allow_change=["model.num_queries"])
    with pytest.raises(UsageError, match="unknown setting in --allow-change"):
        train(Request(), resume=folder, allow_change=["learning_rate"])
    watch = Watch()
    train(
        Request(lr=1e-6, epochs=3, steps=9),
        resume=folder,
        allow_change=["lr", "epochs", "lr_drop"],
        watch=watch,
    )
    assert max(g["lr"] / g["factor"] for g in watch.job.trainer.optimizer.param_groups) <= 1e-6
    assert runs.find(folder).settings()["recipe.lr"] == 1e-6


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"resume": "run", "out": "elsewhere"}, "run goes on where it is, not in elsewhere"),
        ({"out": "elsewhere", "allow_change": ["lr"]}, "--allow-change is for a run that goes on"),
        ({"resume": "auto", "allow_change": ["nonsense"]}, "unknown setting in --allow-change 'nonsense'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(ask, tmp_path, monkeypatch, wish, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match=said):
        train(ask(), **wish)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "1.5"])
def test_a_stored_setting_that_was_spoiled_is_named_with_its_line(ask, tmp_path, seed):
    folder = train(ask(steps=1), out=tmp_path / "run").folder
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", f"seed = {seed}"))
    with pytest.raises(CheckpointError, match=r"config\.toml:\d+: .*seed (must be at|needs a whole number)"):
        train(Request(steps=2), resume=folder)


def test_auto_does_not_take_a_folder_with_a_state_for_a_run(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_RUNS", str(tmp_path))
    folder = train(ask(steps=1)).folder
    (folder / "run.json").unlink()
    with pytest.raises(UsageError, match="train needs data and a model"):
        train(Request(), resume="auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here, and the test is about a machine without")
def test_a_run_of_a_device_that_is_not_here_says_how_to_go_on(ask, tmp_path):
    folder = train(ask(steps=1), out=tmp_path / "run").folder
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda"'))
    with pytest.raises(UsageError, match=r"was trained on cuda: device 'cuda' cannot be used") as caught:
        train(Request(steps=2), resume=folder)
    assert "--device cpu --allow-change device" in caught.value.hint
    assert train(Request(steps=2, device="cpu"), resume=folder, allow_change=["device"]).steps == 2


def test_data_that_has_changed_is_not_gone_on_with_unknowingly(ask, copied, tmp_path):
    folder, path = tmp_path / "run", copied / "annotations" / "instances_val.json"
    train(ask(data=str(copied), epochs=3), out=folder, watch=Watch(6, STOP))
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"^val of .* have other pictures, objects") as caught:
        train(Request(), resume=folder)
    assert "--allow-change data" in caught.value.hint
    assert train(Request(steps=8), resume=folder, allow_change=["data"]).steps == 8
    assert train(Request(steps=9), resume=folder).steps == 9  # it is the run's data from then on
    train_file = path.with_name("instances_train.json")
    renamed = train_file.read_text().replace('"square"', '"box"')
    train_file.write_text(renamed)
    with pytest.raises(DataError, match="has learned other classes"):
        train(Request(), resume=folder, allow_change=["data"])


def test_a_state_that_says_nothing_of_its_data_is_gone_on_with(ask, tmp_path):
    """As earlier versions wrote them."""
    folder = tmp_path / "run"
    train(ask(steps=1), out=folder)
    kept = state.read(folder)
    del kept["classes"], kept["data"]
    state.save(folder, kept)
    assert train(Request(steps=2), resume=folder).steps == 2


def test_auto_takes_the_unfinished_run_of_the_same_work(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_RUNS", str(tmp_path))
    first = train(ask(), resume="auto", watch=Watch(2, STOP))  # none yet: a new one
    other = train(ask(model="deformable_detr/tiny"), resume="auto")
    assert other.folder != first.folder
    ended = train(ask(), resume="auto")
    assert ended.folder == first.folder
    assert ended.steps == 10
    assert train(ask(), resume="auto").folder != first.folder  # that one is finished


def test_a_state_that_was_damaged_gives_way_to_the_one_before(ask, tmp_path, caplog):
    folder = tmp_path / "run"
    train(ask(), out=folder, watch=Watch(6, STOP))
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)
    assert state.read(folder)["step"] == 5
    assert "going on from the one before" in caplog.text
    (folder / "state-before.pt").unlink()
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        state.read(folder)


@pytest.mark.parametrize("damage", ["empty", "cut short", "no state", "gone"])
def test_the_good_state_stays_until_there_is_a_new_one(ask, tmp_path, caplog, damage, monkeypatch):
    folder = tmp_path / "run"
    train(ask(), out=folder, watch=Watch(6, STOP))
    newest, before = folder / state.STATE, folder / state.BEFORE
    content = {"empty": b"", "cut short": newest.read_bytes()[:-1000], "no state": b"hello\n" * 99}
    newest.unlink()
    if damage != "gone":
        newest.write_bytes(content[damage])
    train(Request(), resume=folder, watch=Watch(7, STOP))
    told = "is not there" if damage == "gone" else "is damaged: it is cut short, or no state at all"
    assert f"{newest} {told}; going on from the one before it, state-before.pt of step 5" in caplog.text
    assert (state._load(newest)["step"], state._load(before)["step"]) == (8, 5)
    for path in (newest, before):
        path.write_bytes(b"hello")
    with pytest.raises(CheckpointError) as caught:
        train(Request(), resume=folder)
    assert "weights_only" not in caught.value.message
    assert caught.value.hint == f"start a new run from its weights: --weights {folder / 'last.safetensors'}"


def test_nobody_else_trains_into_the_folder(ask, tmp_path):
    with pytest.raises(DetrError, match="another process is training in"):
        train(ask(), out=tmp_path / "run", watch=Watch(6, lambda: train(Request(), resume=tmp_path / "run")))


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(ask, tmp_path):
    """Weights, optimiser and the step to go on with are those of the step before."""
    watch = Watch()

    def spoil():
        watch.kept = state.digest({n: v.clone() for n, v in watch.job.net.state_dict().items()})
        criterion = watch.job.trainer.learner.learner.criterion
        watch.job.trainer.learner.learner.criterion = lambda *a: spoiled(criterion(*a))

    def spoiled(losses):
        terms = {**losses.terms, "giou_0": torch.tensor(float("nan"))}
        return replace(losses, total=losses.total * float("nan"), terms=terms)

    watch.at, watch.do = 3, spoil
    with pytest.raises(NonFiniteError, match=r"step 4 .*terms: giou_0; lr .*pictures: \d+, \d+") as caught:
        train(ask(), out=tmp_path / "run", watch=watch)
    assert caught.value.exit_code == 1
    assert f"--resume {tmp_path / 'run'} --lr LOWER --allow-change lr; where" in caught.value.hint
    kept = state.read(tmp_path / "run")
    assert kept["step"] == 4
    assert state.digest(kept["model"]) == watch.kept
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert train(Request(), resume=tmp_path / "run").steps == 10


ABSURD = {"lr": 1e25, "steps": 4}


@pytest.mark.parametrize("stopped", [False, True], ids=["at its score", "at its score after a stop"])
def test_weights_that_are_not_finite_where_they_are_scored_do_not_become_the_state(ask, tmp_path, stopped):
    """One step an epoch, and the rate changed to one with which the next step is the last: what is advised then helps."""
    folder, wish = tmp_path / "run", {"recipe.warmup_steps": 0}
    train(ask(batch_size=20, epochs=6, steps=2, changes=wish), out=folder)
    if stopped:  # before the score: these weights are the newest state
        assert train(Request(**ABSURD), resume=folder, allow_change=["lr"], watch=Watch(2, STOP)).steps == 3
    with pytest.raises(
        NonFiniteError, match=r"after 3 steps .* NaN .*; the state is of a step before"
    ) as caught:
        train(Request(**ABSURD), resume=folder, allow_change=["lr"])
    assert caught.value.exit_code == 1
    assert f"--resume {folder} --lr LOWER --allow-change lr" in caught.value.hint
    assert "--amp" not in caught.value.hint  # it is off
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert state.read(folder)["step"] == 2
    assert train(Request(lr=1e-4, steps=4), resume=folder, allow_change=["lr"]).steps == 4
    assert sorted(losses(folder)) == [0, 1, 2, 3]


def test_where_the_first_weights_that_are_scored_are_not_finite_only_the_start_is_left(ask, tmp_path):
    request = ask(batch_size=20, lr=1e25, changes={"recipe.warmup_steps": 0})
    with pytest.raises(NonFiniteError, match="there is no state of a step before") as caught:
        train(request, out=tmp_path / "run")
    assert caught.value.hint == "begin anew with a lower rate: --lr LOWER"


def test_too_little_memory_is_told_with_a_way_on(ask, tmp_path):
    watch = Watch()

    def shorten():
        def forward(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        watch.job.trainer.learner.learner.forward = forward

    watch.at, watch.do = 1, shorten
    with pytest.raises(
        guard.MemoryShortError, match=r"step 2: 4 pictures at once, padded to 64 x 64; peak \d+\.\d of \d+"
    ) as caught:
        train(ask(), out=tmp_path / "run", watch=watch)
    onward = f"to go on: --resume {tmp_path / 'run'} --device-batch 2 --allow-change device_batch"
    assert onward in caught.value.hint
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    words = {"resume": tmp_path / "run", "allow_change": ["device_batch"]}
    assert train(Request(device_batch=2), **words).steps == 10  # what was advised works


def test_the_largest_batch_is_the_first_that_fits():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 5:
            raise guard.MemoryShortError("too much")

    assert estimate.largest(12, attempt) == 4
    assert tried == [12, 6, 4]
    with pytest.raises(guard.MemoryShortError):
        estimate.largest(12, lambda size: attempt(99))


def test_the_worst_batch_is_a_step_like_any_other(ask):
    job = assemble(make_plan(ask()))
    job.net.train()
    worst = estimate.worst_batch(job, 2)
    step = job.trainer.step([worst], 0, 0, 1.0)
    assert step.loss > 0
    assert max(worst.images.shape[-2:]) == job.model.variant.preprocess.long_side


def test_auto_batch_says_that_it_needs_a_gpu(ask):
    with pytest.raises(UsageError, match="--auto-batch fills the memory of a GPU"):
        estimate.with_largest_batch(make_plan(ask()), 1)


def test_a_run_goes_on_with_what_fits_now_and_tells_before_what_it_would_do(ask, tmp_path, monkeypatch):
    """Neither data nor model are named, what it started from is gone, and another batch is no change that must be allowed."""
    start, folder = write_run(tmp_path / "start"), tmp_path / "run"
    train(ask(weights=str(start), seed=3), out=folder, watch=Watch(6, STOP))
    shutil.rmtree(start)
    told = detr("train", "--resume", folder, "--dry-run", "--json").json
    assert told["plan"] == json.loads(json.dumps(to_plain(read_plan(folder))))
    assert (told["plan"]["seed"], told["steps"], told["done"]) == (3, 10, 7)

    monkeypatch.setattr(estimate, "_check_device", lambda device: None)
    monkeypatch.setattr(estimate, "worst_batch", only_one_fits)
    watch = Watch()
    assert train(Request(), resume=folder, auto_batch=True, watch=watch).steps == 10
    assert watch.job.loader.sampler.batch_size == 1
    assert "--auto-batch: 1 pictures at once fit on a device" in watch.job.notes
    assert runs.find(folder).settings()["device_batch"] == 1


def test_an_estimate_counts_and_writes_nothing(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_RUNS", str(tmp_path / "runs"))
    tried = estimate.estimate(make_plan(ask(batch_size=8, device_batch=2)), devices=2)
    assert (tried.images, tried.classes, tried.val_images) == (20, 3, 7)
    assert (tried.at_once, tried.parts, tried.devices) == (2, 2, 2)
    assert (tried.steps, tried.steps_per_epoch) == (4, 2)
    assert tried.parameters >= tried.learned > 200_000
    assert tried.seconds > 0
    assert tried.peak_bytes > 2**20
    assert not (tmp_path / "runs").exists()


def test_waiting_for_data_is_part_of_the_time(ask, tmp_path, monkeypatch):
    """In what is recorded, in the speed and the time left that are shown, and in what is told before."""
    read = Samples.view

    def slowly(self, epoch, index):
        time.sleep(0.1)
        return read(self, epoch, index)

    monkeypatch.setattr(Samples, "view", slowly)
    facts = Facts(steps=10, epochs=2, steps_per_epoch=5, done=5, device="cpu")

    class Look(Watch):
        def step(self, step):
            facts.recent.append(step)

    begun = time.perf_counter()
    done = train(ask(epochs=1), out=tmp_path / "run", watch=Look())
    took = time.perf_counter() - begun
    history = runs.find(done.folder).history()
    (_, whole), (_, waited) = history.curve("seconds"), history.curve("waited")
    assert all(0.4 <= w < s for w, s in zip(waited, whole, strict=True))
    assert 2.0 <= sum(whole) <= took
    assert facts.rate == pytest.approx(5 / sum(whole), rel=1e-2)
    assert 0.4 / max(whole) < facts.waiting < 1
    assert int(facts.left.rpartition(":")[2]) >= 2
    tried = estimate.estimate(make_plan(ask()))
    assert 0.4 <= tried.waited_seconds < tried.step_seconds
    assert tried.seconds == pytest.approx(10 * tried.step_seconds)


def test_a_disk_without_room_is_told_before_the_first_step(ask, tmp_path, monkeypatch):
    usage = machine.shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert train(ask(steps=1), out=tmp_path / "small").steps == 1
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    with pytest.raises(DetrError, match="GiB free; the run's checkpoints need"):
        train(ask(steps=1), out=tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_a_run_that_goes_on_needs_room_only_for_what_it_has_not(ask, tmp_path, monkeypatch):
    """Two states and weights are there, and half a state that a kill has left, in whose place the next comes."""
    folder = tmp_path / "run"
    train(ask(), out=folder, watch=Watch(6, STOP))
    half = folder / ".state.pt.x.tmp"
    half.write_bytes(bytes((folder / "state.pt").stat().st_size // 2))
    whole = sum(file.stat().st_size for file in (*folder.glob("state*.pt"), *folder.glob("*.safetensors")))
    usage = machine.shutil.disk_usage(tmp_path)._replace(free=whole // 2)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DetrError, match="GiB free"):
        train(ask(), out=tmp_path / "new")
    assert train(Request(steps=8), resume=folder).steps == 8
    assert not half.exists()


@pytest.mark.parametrize("ratio", [2.2, 0.4])
def test_16_bits_that_only_cost_time_are_told(ask, monkeypatch, ratio):
    monkeypatch.setattr(jobs, "bf16_speed", lambda: ratio)
    notes = assemble(make_plan(ask(amp="bf16"))).notes
    assert any("0.4 times the speed of float32" in note for note in notes) == (ratio < 1)


def test_compiling_changes_nothing_but_time(ask, monkeypatch):
    """With the compiler left out: that the backbone is the compiled one, and is found under its own names."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    one, other = (assemble(make_plan(ask(compile=c))) for c in (False, True))
    assert one.net.state_dict().keys() == other.net.state_dict().keys()
    assert "the backbone is compiled" in " ".join(other.notes)
    (parts, *_) = one.loader.steps(0)
    assert one.trainer.step(parts, 0, 0, 1.0).loss == pytest.approx(other.trainer.step(parts, 0, 0, 1.0).loss)


@pytest.mark.long
@pytest.mark.parametrize("model", ["detr/tiny", "deformable_detr/tiny"])
def test_a_compiled_training_is_the_plain_one(ask, tmp_path, model):
    """Through the real compiler, an evaluation and a stop included. Fused operations round otherwise, hence a tolerance."""
    plain = train(ask(model=model), out=tmp_path / "plain")
    compiled = stopped_and_resumed(ask(model=model, compile=True), tmp_path / "compiled")
    assert losses(compiled.folder) == pytest.approx(losses(plain.folder), rel=1e-3)
    assert (
        load_file(compiled.folder / "last.safetensors").keys()
        == load_file(plain.folder / "last.safetensors").keys()
    )


def test_deterministic_asks_torch_for_it(ask):
    try:
        assemble(make_plan(ask(deterministic=True)))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"ema": 1.5}, "--ema needs a decay between 0 and 1"),
        ({"device_batch": 3}, "cannot be made of parts of 3"),
        ({"data": None}, "train needs data and a model"),
        ({"changes": {"recipe.epochs": 0}}, "recipe.epochs must be at least 1"),
        ({"changes": {"recipe.batch_size": 0}}, "recipe.batch_size must be at least 1"),
        ({"changes": {"recipe.lr": -1.0}}, r"recipe.lr must be at least 0 \(value given: -1.0\)"),
        ({"changes": {"recipe.lr": float("nan")}}, "recipe.lr must be at least 0"),
        ({"changes": {"recipe.weight_decay": -1.0}}, "recipe.weight_decay must be at least 0"),
        ({"changes": {"recipe.warmup_steps": -1}}, "recipe.warmup_steps must be at least 0"),
        ({"changes": {"recipe.lr_factors": {"backbone": -0.1}}}, "recipe.lr_factors.backbone must be"),
        ({"changes": {"recipe.lr_drop": [3, 0]}}, "recipe.lr_drop must be at least 1"),
        ({"changes": {"recipe.clip_norm": 0.0}}, "recipe.clip_norm must be above 0"),
    ],
)
def test_wishes_that_mean_nothing_are_told(ask, wish, said):
    with pytest.raises(UsageError, match=said):
        make_plan(ask(**wish))


def test_a_disk_that_is_full_for_a_while_costs_nothing(ask, tmp_path, monkeypatch, caplog):
    """Every save of the first epoch fails: the run goes on, and its last state is whole."""
    real, calls = state.save, []

    def save(folder, content):
        calls.append(content["step"])
        if content["step"] <= 5:
            raise DetrError("cannot write state.pt: No space left on device")
        real(folder, content)

    monkeypatch.setattr(run.state, "save", save)
    done = train(ask(save_every=0.0), out=tmp_path / "run")
    assert done.steps == 10
    assert calls[:5] == [1, 2, 3, 4, 5]
    assert "training goes on, and tries again" in caplog.text
    assert state.read(tmp_path / "run")["step"] == 10
