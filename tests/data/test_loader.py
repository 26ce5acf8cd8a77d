from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detrcli.data import loader as loading
from detrcli.data.catalog import resolve
from detrcli.data.loader import Samples, collate, eval_loader, train_loader
from detrcli.data.sampler import EpochSampler, Shard
from detrcli.data.shapes import load_shapes
from detrcli.data.transforms import normalise, training
from detrcli.errors import DetrError, ImageError
from detrcli.plugins.contract import Preprocess
from detrcli.types import Sample, Target

TINY = Preprocess(short_side=64, long_side=96)


def same(a, b) -> bool:
    return (
        a.image_ids == b.image_ids
        and torch.equal(a.images, b.images)
        and torch.equal(a.mask, b.mask)
        and all(torch.equal(x.boxes, y.boxes) for x, y in zip(a.targets, b.targets, strict=True))
    )


def loader(dataset, **options):
    return train_loader(dataset, training("detr", TINY), **{"batch_size": 2, "seed": 5, **options})


def test_batches_are_padded_at_the_bottom_and_on_the_right():
    target = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    samples = [Sample(torch.ones(3, h, w), target, i, (h, w)) for i, (h, w) in enumerate([(4, 6), (5, 3)])]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 5, 6)
    assert torch.equal(batch.images[:, 0] == 0, batch.mask)
    assert batch.mask.sum(dim=(1, 2)).tolist() == [6, 15]
    assert not batch.mask[0, :4, :6].any()
    assert batch.original_sizes.tolist() == [[4, 6], [5, 3]]


def test_a_batch_holds_what_its_samples_are(coco_folder):
    dataset = resolve(str(coco_folder), "val")
    (batch,) = eval_loader(dataset, TINY, batch_size=4)
    assert batch.image_ids == (42, 7, 100, 9)
    assert batch.original_sizes.tolist() == [[48, 64], [60, 40], [50, 30], [32, 32]]
    assert torch.equal(batch.images[0, :, :64, :85], normalise(_scaled(dataset, 0, (64, 85)), TINY))
    assert [t.labels.tolist() for t in batch.targets] == [[0, 2], [1], [1], []]  # the crowd is left out
    assert (batch.images.masked_select(batch.mask[:, None]) == 0).all()


def _scaled(dataset, index, size):
    from detrcli.data.transforms import scale_pixels

    return scale_pixels(dataset.picture(index), size)


def test_the_number_of_workers_changes_nothing(coco_folder):
    dataset = load_shapes(count=9)
    plain, parallel = loader(dataset), loader(dataset, workers=2)
    for epoch in (0, 1):
        expected = list(plain.epoch(epoch))
        assert len(expected) == len(plain) == 4
        assert all(map(same, expected, parallel.epoch(epoch)))
    rest = list(parallel.epoch(1, start=2))  # as after a resume
    assert len(rest) == 2
    assert all(map(same, expected[2:], rest))


@pytest.mark.parametrize("kind", ["detr", "flip", "none"])
def test_what_workers_hold_survives_pickling(coco_folder, kind):
    """As it must where processes are spawned."""
    for dataset in (
        load_shapes(count=4),
        resolve(str(coco_folder), "train"),
        load_shapes(count=9).select([8, 1]),
    ):
        samples = Samples(dataset, training(kind, TINY), seed=3)
        copy = pickle.loads(pickle.dumps(samples))
        assert same(samples[[(2, 1), (2, 0)]].batch, copy[[(2, 1), (2, 0)]].batch)


def test_epochs_and_seeds_differ():
    dataset = load_shapes(count=8)
    first = next(loader(dataset).epoch(0))
    assert same(first, next(loader(dataset).epoch(0)))
    assert not same(first, next(loader(dataset).epoch(1)))
    assert not same(first, next(loader(dataset, seed=6).epoch(0)))


def indices(sampler, epoch=0, start=0):
    return [[i for _, i in batch] for batch in sampler.keys(epoch, start)]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_ranks_share_out_the_same_global_batches(length, batch_size, world, epoch, grouped):
    portrait = np.arange(length) % 3 == 0 if grouped else None
    ranks = [
        indices(EpochSampler(length, batch_size, 1, rank, world, portrait), epoch) for rank in range(world)
    ]
    assert len({len(r) for r in ranks}) == 1  # all take the same number of steps
    steps = [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    one = EpochSampler(length, batch_size * world, 1, portrait=portrait)
    if length >= batch_size * world:
        assert steps == [sorted(batch) for batch in indices(one, epoch)]
        seen = list(chain.from_iterable(steps))
        assert len(seen) == len(set(seen)) == length // (batch_size * world) * batch_size * world
    else:
        assert len(steps) == 1
        assert set(steps[0]) == set(range(length))
        assert all(len(r[0]) >= 1 for r in ranks)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_parts_and_ranks_share_out_the_same_steps(length, batch_size, world, parts, grouped):
    """However a step is divided, it holds the same pictures, and every rank accumulates as many batches."""
    portrait = np.arange(length) % 3 == 0 if grouped else None
    samplers = [
        EpochSampler(length, batch_size, 1, rank, world, portrait, parts=parts) for rank in range(world)
    ]
    shares = [indices(sampler) for sampler in samplers]
    count = samplers[0].batches_a_step
    assert {len(share) for share in shares} == {len(samplers[0]) * count}
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)
    whole = EpochSampler(length, batch_size * world * parts, 1, portrait=portrait)
    for step, wanted in enumerate(indices(whole)):
        mine = slice(step * count, (step + 1) * count)
        assert set(chain.from_iterable(chain.from_iterable(share[mine]) for share in shares)) == set(wanted)
    later = samplers[0].keys(0, len(samplers[0]) - 1)
    assert later == samplers[0].keys(0, 0)[-count:]


def test_grouped_batches_hold_one_orientation_but_for_the_last():
    portrait = np.random.default_rng(0).random(101) < 0.3
    batches = indices(EpochSampler(101, 4, 0, portrait=portrait))
    mixed = [len({bool(portrait[i]) for i in batch}) > 1 for batch in batches]
    assert sum(mixed) <= 2
    assert not any(mixed[:-2])
    assert len(batches) == 25


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5))
def test_evaluation_sees_every_image_once_over_all_ranks(length, world, batch_size):
    shards = [Shard(length, batch_size, rank, world) for rank in range(world)]
    batches = [batch for shard in shards for batch in indices(shard)]
    assert sorted(chain.from_iterable(batches)) == list(range(length))
    assert sum(map(len, shards)) == len(batches)
    assert all(len(batch) <= batch_size for batch in batches)


def test_a_single_picture_is_a_data_set():
    batches = list(loader(load_shapes(count=1), batch_size=16).epoch(0))
    assert [len(b.image_ids) for b in batches] == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_is_named_in_one_line(coco_folder, workers):
    (coco_folder / "train2017" / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(ImageError) as caught:
        list(loader(resolve(str(coco_folder), "train"), workers=workers).epoch(0))
    assert caught.value.message.endswith("a.jpg: not a picture (it begins with 'nothing')")


def test_a_bad_picture_can_be_skipped_and_is_remembered(coco_folder):
    (coco_folder / "train2017" / "a.jpg").write_bytes(b"nothing")
    batches = loader(resolve(str(coco_folder), "train"), skip_bad=True)
    seen = [image for batch in batches.epoch(0) for image in batch.image_ids]
    assert len(seen) == 4
    assert 42 not in seen
    assert list(batches.skipped) == ["a.jpg"]
    assert "not a picture" in batches.skipped["a.jpg"]


def test_a_data_set_without_one_good_picture_is_refused(coco_folder):
    for path in (coco_folder / "train2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ImageError, match="no picture can be read"):
        list(loader(resolve(str(coco_folder), "train"), skip_bad=True).epoch(0))


@dataclasses.dataclass(frozen=True)
class Deadly:
    """Pictures whose reader is killed `times` times at picture 5, as by the kernel when memory runs out."""

    marks: Path
    times: int

    def read(self, index, name, size):
        if index == 5:
            earlier = len(list(self.marks.iterdir()))
            if earlier < self.times:
                (self.marks / str(earlier)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3, 8, 8), index, dtype=torch.uint8)


@pytest.mark.parametrize("times", [1, 2])
def test_the_death_of_a_worker_is_survived_once_and_then_named(tmp_path, times):
    dataset = dataclasses.replace(load_shapes(count=8), pictures=Deadly(tmp_path, times))
    batches = eval_loader(dataset, TINY, batch_size=2, workers=1)
    before = signal.getsignal(signal.SIGCHLD)
    seen: list[int] = []
    if times == 1:
        seen += [image for batch in batches for image in batch.image_ids]
        assert seen == list(range(1, 9))
    else:
        with pytest.raises(DetrError, match=r"died twice .* while reading 000006\.png"):
            seen += [image for batch in batches for image in batch.image_ids]
    assert signal.getsignal(signal.SIGCHLD) == before


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Pictures with a programming error in their reader."""

    def read(self, index, name, size):
        raise RuntimeError("a defect of the reader")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_a_worker_is_not_taken_for_its_death(workers):
    dataset = dataclasses.replace(load_shapes(count=4), pictures=Faulty())
    with pytest.raises(RuntimeError, match="a defect of the reader"):
        list(eval_loader(dataset, TINY, workers=workers))


LITTLE = """
import sys
from detrcli.data.loader import train_loader
from detrcli.data.shapes import load_shapes
from detrcli.data.transforms import training
from detrcli.errors import DetrError
from detrcli.plugins.contract import Preprocess

transform = training("none", Preprocess(short_side=64, long_side=64))
try:
    batches = train_loader(load_shapes(count=64), transform, batch_size=8, seed=0, workers=2)
    print(sum(1 for _ in batches.epoch(0)))
except DetrError as error:
    print(error.message, error.hint)
"""


@pytest.mark.skipif(
    not (Path("/dev/shm").is_dir() and shutil.which("unshare")),
    reason="no /dev/shm or no unshare here, to make shared memory small",
)
@pytest.mark.parametrize("size", ["4k", "64k", "1m", "64m"])
def test_little_shared_memory_is_told_with_a_way_on(size):
    """A container has little unless told: for not even the data set, no process, no batch; and for all."""
    mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no right to mount here, which a small disk of its own needs")
    words = ["unshare", "-m", "sh", "-c", f'{mounted} && exec "$0" -c "$1"', sys.executable, LITTLE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if size == "64m":
        assert done.stdout == "8\n", done.stderr
    else:
        assert done.stdout.startswith("/dev/shm is full"), done.stdout + done.stderr
        assert "--shm-size" in done.stdout
        assert "--workers 0" in done.stdout


GROWTH = """
import multiprocessing
from pathlib import Path
from detrcli.data.loader import train_loader
from detrcli.data.shapes import load_shapes
from detrcli.data.transforms import training
from detrcli.plugins.contract import Preprocess

def private_megabytes(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

transform = training("detr", Preprocess(short_side=64, long_side=96))
batches = train_loader(load_shapes(count=200), transform, batch_size=8, seed=0, workers=2)
for epoch in range(5):
    for _ in batches.epoch(epoch):
        pass
    workers = multiprocessing.active_children()
    print(sum(private_megabytes(worker.pid) for worker in workers), len(workers))
"""


def test_memory_does_not_grow_over_epochs_with_workers():
    """In a process of its own: the workers of a test run inherit, and slowly copy, all that the run has in memory."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    epochs = [line.split() for line in done.stdout.splitlines()]
    assert [workers for _, workers in epochs] == ["2"] * 5
    sizes = [float(size) for size, _ in epochs]
    assert sizes[-1] - sizes[0] < 8, sizes


def test_a_gpu_gets_its_share_of_processes_that_read(monkeypatch):
    monkeypatch.setattr(loading, "processors", lambda: 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert loading.readers("cuda:1") == 3
    assert loading.readers("cpu") == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert loading.readers("cuda") == 8
