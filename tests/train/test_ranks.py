"""Training on several processes is training on one: the same gradients, losses and weights, the same scores, one set of files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from detrcli import distributed, evaluate, launch
from detrcli.errors import UsageError
from detrcli.evaluate import run as evaluation
from detrcli.meeting import PeerError, agreed_name
from detrcli.plugins import resolve
from detrcli.train import estimate, state
from detrcli.train.job import _trainer
from detrcli.train.loop import Trainer
from detrcli.train.optim import parameter_groups
from detrcli.train.plan import Request, make_plan
from detrcli.train.run import train
from detrcli.types import Batch, Categories, Target
from tests.cli.run import detr
from tests.train.conftest import only_one_fits
from tests.train.interrupting import Sent, deaf

PLACES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
CLASSES = Categories((1, 2, 3), ("circle", "square", "triangle"))
EXACT = ["detr/tiny", "deformable_detr/tiny", "dynamic_detr/tiny", "d2etr/tiny", "lite_deformable/tiny"]
NOISY = ["dino/tiny", "lite_dino/tiny"]  # each rank draws its own denoising queries
OBJECTS = (1, 2, 3, 0, 0, 5, 0, 1)  # of eight pictures; with two ranks and two parts, one part has none
SPARSE = (0, 0, 1, 0, 0, 0, 0, 0)  # less than one a part
NONE = (0,) * 8


def batch(indices, counts):
    images, targets = [], []
    for i in indices:
        g = torch.Generator().manual_seed(i)
        images.append(torch.randn(3, 64, 64, generator=g, dtype=torch.float64))
        boxes = torch.rand(counts[i], 4, generator=g, dtype=torch.float64) * 0.3 + 0.3
        masks = torch.ones(counts[i], 64, 64, dtype=torch.uint8)
        targets.append(Target(torch.randint(3, (counts[i],), generator=g), boxes, {"masks": masks}))
    mask = torch.zeros(len(images), 64, 64, dtype=torch.bool)
    sizes = torch.full((len(images), 2), 64)
    return Batch(torch.stack(images), mask, tuple(targets), tuple(indices), sizes)


def three_steps(name, parts, counts=OBJECTS):
    """Losses and gradients of three steps of this rank's share of the same eight pictures, in float64."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resolve(name)
    net = model.build(len(CLASSES)).double().train()
    with torch.no_grad():  # fresh models give all queries one box, and of equal matches rounding takes one
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    plan = make_plan(Request(data="shapes", model=name, batch_size=8, device="cpu"))
    plan = replace(plan, recipe=replace(plan.recipe, clip_norm=1e9, lr=1e-3, warmup_steps=0))
    trainer = _trainer(plan, model, net, CLASSES, "cpu")
    # AdamW makes a whole step of a gradient that is zero but for rounding, in a direction that rounding chooses
    trainer.optimizer = torch.optim.SGD(parameter_groups(net, plan.recipe), lr=1e-3)
    mine = list(range(8))[distributed.rank() :: distributed.world_size()]
    size = len(mine) // parts
    cuts = [batch(mine[i : i + size], counts) for i in range(0, len(mine), size)]
    steps = [trainer.step(cuts, number, 0, 1.0) for number in range(3)]
    gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return [s.loss for s in steps], gradients


def many(names, parts, counts):
    return {name: three_steps(name, parts, counts) for name in names}


def assert_same_steps(ours, wanted, name):
    losses, gradients = wanted
    assert ours[0] == pytest.approx(losses, rel=1e-9), name
    largest = max(g.abs().max() for g in gradients.values())
    assert ours[1].keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert (ours[1][parameter] - gradient).abs().max() < 1e-8 * largest, (name, parameter)


@pytest.mark.parametrize(
    ("parts", "names", "counts"),
    [(1, EXACT[:2], OBJECTS), (2, EXACT, OBJECTS), (2, EXACT[:2], SPARSE)],
    ids=["ranks", "ranks and parts", "few objects"],
)
def test_two_ranks_compute_what_one_does(parts, names, counts):
    """In float64, so that nothing hides in rounding; the third step shows that the weights went the same way, too."""
    shared = launch.on_ranks(2, many, names + NOISY, parts, counts)
    for name in names:
        assert_same_steps(shared[name], three_steps(name, 1, counts), name)
    for name in NOISY:
        assert all(map(torch.isfinite, map(torch.tensor, shared[name][0])))


@pytest.mark.parametrize("counts", [SPARSE, NONE], ids=["one object", "no object"])
@pytest.mark.parametrize("name", EXACT)
def test_parts_compute_what_the_whole_does_however_few_the_objects(name, counts):
    assert_same_steps(three_steps(name, 4, counts), three_steps(name, 1, counts), name)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "little"
    assert detr("data", "shapes", folder, "--train", "20", "--val", "7").code == 0
    return folder


SMALL = {"model": "deformable_detr/tiny", "batch_size": 4, "device": "cpu"}


def test_a_run_on_two_devices_is_the_run_on_one_and_goes_on_there(shapes, tmp_path):
    """Seven pictures to score do not divide by two. Stopped on two devices, continued on one."""
    request = Request(data=str(shapes), epochs=2, **SMALL)
    alone = train(request, out=tmp_path / "alone")
    both = train(replace(request, steps=7), out=tmp_path / "both", devices=2)
    assert both.steps == 7
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == sorted(
        p.name for p in (tmp_path / "both").iterdir()
    )
    ended = train(Request(steps=10), resume=tmp_path / "both")
    assert losses(ended.folder) == pytest.approx(losses(alone.folder), rel=1e-4)
    assert ended.metrics == pytest.approx(alone.metrics, abs=0.02)
    scored = [json.loads(line) for line in (ended.folder / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in scored if "ap" in line]) == 3  # after steps 5 and 7, and at the end


def command(shapes, run, *more):
    words = ["train", str(shapes), "-m", "deformable_detr/tiny", "--batch-size", "4", "--out", str(run)]
    return [sys.executable, "-m", "detrcli", *words, *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DETR_TIMEOUT": "120", "NO_COLOR": "1"}


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def children(pid):
    """The ranks, not the process that watches over shared memory."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_the_death_of_a_rank_ends_the_job_and_the_last_state_stands(shapes, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(shapes, run, "--epochs", "400", "--devices", "2"),
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_for(lambda: (run / "state.pt").exists())
    second = children(process.pid)[1]
    os.kill(second, signal.SIGKILL)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 40
    assert process.returncode == 1
    assert "error: process 1 of 2 ended early (exit code -9)" in said
    assert "Traceback" not in said
    kept = state.read(run)
    again = detr("train", shapes, "-m", "deformable_detr/tiny", "--batch-size", "4", "--epochs", "400", "--out", run,
                 "--resume", "auto", "--steps", str(kept["step"] + 3), "--json")  # fmt: skip
    assert again.code == 0, again.err
    assert again.json["steps"] == kept["step"] + 3


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_job_in_time(shapes, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(shapes, run, "--epochs", "400", "--devices", "2"),
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"DETR_TIMEOUT": "20"},
    )
    wait_for(lambda: (run / "state.pt").exists())
    os.kill(children(process.pid)[1], signal.SIGSTOP)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "error: another process has gone or does not answer" in said
    assert "--resume auto" in said
    assert state.read(run)["step"] >= 5


@pytest.mark.long
def test_torchrun_starts_again_and_the_run_goes_on(shapes, tmp_path):
    """A worker is killed; all are started anew, and the same command finds its run."""
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(shapes, run, "--epochs", "8", "--resume", "auto", "--json")[2:]
    process = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_for(lambda: (run / "state.pt").exists())
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert json.loads(out.splitlines()[-1])["steps"] == 40
    assert sorted(losses(run)) == list(range(40))


def test_processes_of_a_restart_do_not_take_the_dead_for_their_own():
    """They get the store of those before them, and each at its own time: what stands in it may be old."""
    store = torch.distributed.HashStore()
    store.set("call", "old")
    store.set("answer 1", "old one")
    store.set("answer 2", "old two")
    store.set("confirmed", "old one two")
    agreed = ["old"]
    for late in (0, 1, 2):

        def come(rank, late=late):
            time.sleep(0.1 * (rank == late))
            return agreed_name(store, rank, 3, 20)

        with ThreadPoolExecutor(3) as pool:
            (name,) = set(pool.map(come, range(3)))
        assert name not in agreed
        agreed.append(name)
    with pytest.raises(PeerError, match="not all processes have come"):
        agreed_name(store, 0, 2, 0.2)


def test_a_signal_to_the_parent_stops_all_ranks_at_the_same_step(shapes, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(shapes, run, "--epochs", "400", "--devices", "2"),
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_for(lambda: (run / "state.pt").exists())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert f"--resume {run}" in said
    assert state.read(run)["step"] == max(losses(run)) + 1


def stopped_on_the_second(request, out):
    """A run of which the second rank gets a signal in step 2: how it ended, and its parts of a batch, on every rank."""
    estimate._check_device = lambda device: None
    estimate.worst_batch = only_one_fits
    step, parts = Trainer.step, set()

    def look(self, batches, number, *rest):
        parts.add(len(batches))
        if (number, distributed.rank()) == (2, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches, number, *rest)

    with patch.object(Trainer, "step", look):
        done = train(request, out=out, auto_batch=True)
    return distributed.all_of((done.steps, done.stopped_by, sorted(parts)))


def test_a_signal_to_one_rank_and_the_batch_that_fits_on_one_are_those_of_all(shapes, tmp_path):
    ended = launch.on_ranks(2, stopped_on_the_second, Request(data=str(shapes), **SMALL), tmp_path / "run")
    assert [told[:2] for told in ended] == [(3, signal.SIGTERM)] * 2
    assert ended[1][2] == [2]  # the first has tried other parts, too


def met_in_its_second_evaluation(request, out, number):
    """A run that gets a signal while it scores: the steps of the states that there were before each batch of the first rank's
    share, and the signal that ended it."""
    detect, before = evaluation._detect, []

    def look(*args):
        if distributed.is_main():  # the others may look before it has saved
            before.append(state.read(out)["step"])
        if len(before) == 3:
            os.kill(os.getppid(), number)
            time.sleep(0.5)
        return detect(*args)

    with patch.object(evaluation, "_detect", look):
        done = train(request, out=out)
    return before, done.stopped_by


@pytest.mark.parametrize(
    ("number", "stopped_by"),
    [
        pytest.param(signal.SIGTERM, signal.SIGTERM, id="TERM"),
        pytest.param(signal.SIGUSR1, None, id="USR1", marks=pytest.mark.long),
    ],
)
def test_a_signal_in_an_evaluation_is_answered_with_a_state_at_once(shapes, tmp_path, number, stopped_by):
    """The others wait for what each rank finds, so it goes on; but what was learned up to there is safe."""
    request = Request(data=str(shapes), epochs=3, **SMALL)
    before, ended = launch.on_ranks(2, met_in_its_second_evaluation, request, tmp_path / "run", number)
    assert before[:4] == [5, 5, 5, 10]
    assert ended == stopped_by
    assert train(Request(), resume=tmp_path / "run").steps == 15
    assert sorted(losses(tmp_path / "run")) == list(range(15))


def test_ctrl_c_ends_ranks_that_do_not_listen_yet_without_a_word(capfd):
    with pytest.raises(KeyboardInterrupt):
        launch.on_ranks(1, time.sleep, Sent(signal.SIGINT, 60))
    assert capfd.readouterr().err == ""


def test_a_signal_that_a_thread_of_a_library_gets_is_heard():
    """Where it does not interrupt the thread that waits for the ranks."""
    threading.Timer(1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launch.on_ranks(1, time.sleep, 60)


def test_a_second_signal_ends_ranks_at_once():
    begun = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        launch.on_ranks(1, deaf)
    assert caught.value.code == 143
    assert time.monotonic() - begun < 60


def test_what_a_signal_ended_ends_with_its_number_but_an_error_is_told():
    def ended(said, *signals):
        return launch._failure(0, launch._Rank(None, None, said, said is not None), 2, list(signals))

    gone, error = PeerError("gone"), UsageError("wrong")
    assert ended(None, signal.SIGTERM).code == ended(gone, signal.SIGINT, signal.SIGTERM).code == 143
    assert isinstance(ended(None, signal.SIGINT), KeyboardInterrupt)
    assert ended(gone) is gone
    assert ended(error, signal.SIGTERM) is error


def test_torchrun_starts_it_too_and_only_one_process_talks(shapes, tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = command(shapes, run, "--steps", "3", "--json")[2:]
    done = subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert done.stderr.count("training deformable_detr/tiny") <= 1
    assert sorted(losses(run)) == [0, 1, 2]


@pytest.mark.long
def test_a_dry_run_of_torchrun_is_told_once_and_of_its_processes(shapes, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = command(shapes, tmp_path / "run", "--steps", "3", "--json", "--dry-run")[2:]
    done = subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2


@pytest.mark.parametrize(
    ("variables", "options", "said"),
    [
        (
            PLACES | {"RANK": "0", "WORLD_SIZE": "2"},
            ("--devices", "2"),
            "2 were started already, by torchrun",
        ),
        (
            PLACES | {"RANK": "0", "WORLD_SIZE": "2"},
            ("--devices", "2", "--dry-run"),
            "2 were started already",
        ),
        ({"WORLD_SIZE": "2"}, (), "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, (), "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, (), "WORLD_SIZE needs a whole number"),
        ({"RANK": "-1"}, (), "RANK needs a whole number"),
        (PLACES | {"RANK": "0", "WORLD_SIZE": "2", "DETR_TIMEOUT": "10m"}, (), "DETR_TIMEOUT needs seconds"),
    ],
)
def test_what_the_environment_says_of_processes_is_checked(shapes, tmp_path, variables, options, said):
    done = detr(*command(shapes, tmp_path / "run", *options)[3:], env=variables)
    assert said in done.error(2)


def test_one_device_is_not_for_several_processes(shapes, tmp_path, monkeypatch):
    """Whether it stands in a run that goes on or in the environment."""
    request = Request(data=str(shapes), model="detr/tiny", batch_size=4, steps=1, device="cpu:0")
    folder = train(request, out=tmp_path / "run").folder
    with pytest.raises(UsageError, match="cpu:0 is one device, for 2 processes"):
        train(Request(steps=2), resume=folder, devices=2)
    monkeypatch.setenv("DETR_DEVICE", "cpu:0")
    with pytest.raises(UsageError, match="cpu:0 is one device, and 2 were asked for"):
        train(replace(request, device=None), out=tmp_path / "other", devices=2)
    with pytest.raises(UsageError, match="cpu:0 is one device, for 2 processes"):
        evaluate(str(shapes), weights=folder, devices=2)


def test_slurms_variables_are_those_of_torchrun():
    step = {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "20017",
    }  # fmt: skip
    assert launch.slurm(step) == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "15017",
    }  # fmt: skip
    assert launch.slurm({**step, "RANK": "0"}) == {}  # torchrun inside a job
    assert (
        launch.slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}
    )  # a batch script


@pytest.mark.long
def test_slurms_tasks_join_each_other(shapes, tmp_path):
    """Two processes with the variables that srun sets, and nothing else."""
    run = tmp_path / "run"
    task = ENVIRONMENT | {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(command(shapes, run, "--steps", "2"), stderr=subprocess.PIPE, text=True,
                         env=task | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "on 2 devices" in said[0]
    assert said[1] == ""
    assert sorted(losses(run)) == [0, 1]


def test_a_batch_that_cannot_be_shared_is_told(shapes):
    done = detr("train", shapes, "-m", "detr/tiny", "--batch-size", "3", "--devices", "2")
    assert "cannot be shared by 2 devices" in done.error(2)
    assert "--batch-size" in done.err


@pytest.mark.parametrize(
    ("device", "there", "said"), [("cuda:1", 8, "is one device"), (None, 1, "this machine has 1")]
)
def test_devices_that_are_not_there_are_told(monkeypatch, device, there, said):
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: there)
    with pytest.raises(UsageError, match=said):
        launch.check(2, device)
    launch.check(2, "cpu")
