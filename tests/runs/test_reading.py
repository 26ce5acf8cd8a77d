"""Reading what anybody may have put into a folder of runs: told as what it is, never a traceback, never a way out."""

from __future__ import annotations

import json
import os

import pytest

from detrcli import runs
from detrcli.errors import UsageError
from detrcli.report import refresh
from detrcli.runs.history import METRICS_FILE, POINTS, read_history
from tests.cli.run import detr

HOSTILE = "\x1b[2J\x07<script>alert(1)</script>[red]\u202e\n\udc80" + "A" * 5000


def write_metrics(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_long_run_is_read_into_means_that_keep_its_course(tmp_path):
    count = 5 * POINTS
    write_metrics(tmp_path, [{"step": i, "epoch": 0, "loss": 2.0 * i} for i in range(count)])
    history = read_history(tmp_path)
    assert POINTS <= len(history.steps) <= 2 * POINTS
    assert history.stride == 4
    assert sum(row["loss"] for row in history.steps) / len(history.steps) == pytest.approx(count - 1)
    assert all(row["loss"] == pytest.approx(2 * row["step"]) for row in history.steps)


def test_a_short_run_is_read_as_it_is(tmp_path):
    lines = [{"step": i, "epoch": 0, "loss": i / 3} for i in range(2 * POINTS)]
    write_metrics(tmp_path, lines)
    assert read_history(tmp_path).steps == lines


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    whole = b'{"step": 0, "loss": 1.0}\n'
    damaged = [
        b"\n", b"[1]\n", b"{}\n", b"\xff\xfe\n", b'{"step": "x", "loss": 1}\n', b'{"loss": 3}\n', b"[" * 60000 + b"\n",
        b'{"step": 1, "loss": ' + b"9" * 100_000 + b"}\n", b'{"step": NaN, "loss": 1}\n', b'{"step": 3, "lo',
    ]  # fmt: skip
    (tmp_path / METRICS_FILE).write_bytes(whole + b"".join(damaged[:-1]) + whole + damaged[-1])
    history = read_history(tmp_path)
    assert [row["loss"] for row in history.steps] == [1.0, 1.0]
    assert history.damaged == len(damaged)


def test_values_that_are_no_finite_numbers_are_left_out_and_the_rest_kept(tmp_path):
    (tmp_path / METRICS_FILE).write_text(
        '{"step": 0, "loss": 1.0, "a": 1e999, "b": NaN, "c": true, "d": "x"}\n'
    )
    assert read_history(tmp_path).steps == [{"step": 0.0, "loss": 1.0}]


@pytest.fixture
def zoo_of_horrors(place, copy, tmp_path):
    """Everything that may stand in a folder of runs, beside one good run."""
    copy("good")
    copy(
        "hostile",
        model=HOSTILE,
        data={"a": 1},
        best_ap="high",
        metrics=[1],
        step=1e400,
        started_at=7,
        error=HOSTILE,
    )
    nested = copy("nested")
    (nested / "config.toml").write_text("a = " + "[" * 900 + "]" * 900)
    (nested / "run.json").write_text('{"status":"finished","metrics":' + "[" * 100_000)
    huge = copy("huge")
    with (huge / "run.json").open("ab") as file:
        file.truncate(1 << 34)  # sixteen gigabytes of nothing
    (place / "empty").mkdir()
    (place / "foreign").mkdir()
    (place / "foreign" / "notes.txt").write_text("mine")
    (place / "a file").write_text("")
    os.mkfifo(copy("pipe") / "pipe")
    (place / "pipe" / "run.json").unlink()
    os.mkfifo(place / "pipe" / "run.json")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text('{"status": "finished", "secret": "canary"}')
    (place / "link").symlink_to(outside)
    inner = copy("links inside")
    for name in ("config.toml", "environment.json", METRICS_FILE):
        (inner / name).unlink()
        (inner / name).symlink_to(outside / "run.json")
    (place / ("x" * 200 + "\x1b[31m")).mkdir()
    (place / os.fsdecode(b"not\xffutf8")).mkdir()
    (place / "loop").symlink_to(place / "loop")
    return place


def test_a_folder_of_horrors_is_listed_as_what_it_is(zoo_of_horrors):
    states = {run.name: run.status for run in runs.every()}
    assert states["good"] == states["hostile"] == states["links inside"] == "finished"
    assert (
        states["nested"]
        == states["huge"]
        == states["empty"]
        == states["foreign"]
        == states["pipe"]
        == "no run"
    )
    assert "a file" not in states
    for extra in ((), ("--json",)):
        done = detr("runs", "list", *extra)
        assert done.code == 0, done.err
        assert "\x1b" not in done.out + done.err
        assert "canary" not in done.out
    listed = {row["name"]: row for row in json.loads(done.out)["runs"]}
    assert listed["good"]["best_ap"] is not None
    assert listed["hostile"]["best_ap"] is None
    assert listed["hostile"]["metrics"] == {}


def test_each_horror_is_shown_or_refused(zoo_of_horrors):
    for name in ("good", "hostile", "links inside"):
        for extra in ((), ("--json",)):
            done = detr("-v", "runs", "show", name, *extra)
            assert done.code == 0, done.err
            assert "\x1b" not in done.out + done.err
            assert "canary" not in done.out
    for name in ("nested", "huge", "empty", "pipe", "loop"):
        assert "no run" in detr("runs", "show", name).error(2)
    assert "\x1b" not in detr("runs", "show", "goo\x1b[31md").error(2)
    both = detr(
        "runs",
        "compare",
        "good",
        "hostile",
        "links inside",
        "--html",
        "c.html",
        "--png",
        "c.png",
        cwd=zoo_of_horrors,
    )
    assert both.code == 0, both.err
    (zoo_of_horrors / "hostile").rename(zoo_of_horrors / "two\nlines\x1b")
    refresh(zoo_of_horrors / "two\nlines\x1b")
    page = (zoo_of_horrors / "two\nlines\x1b" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_deleted_and_nothing_else(zoo_of_horrors, tmp_path):
    (zoo_of_horrors / "good" / "out").symlink_to(tmp_path / "outside")
    before = left(zoo_of_horrors)
    assert "nothing was deleted" in detr("runs", "rm", "good", stdin="").error(2)  # nobody to ask
    assert left(zoo_of_horrors) == before
    done = detr("runs", "rm", "good", "--yes", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["deleted"] == [str(zoo_of_horrors / "good")]
    assert left(zoo_of_horrors) == [name for name in before if name != "good"]
    assert (tmp_path / "outside" / "run.json").exists()


@pytest.mark.parametrize(
    "name", ["link", "foreign", "empty", "pipe", "nested", "loop", "missing", "", ".", "..", "a file"]
)
def test_what_is_no_run_is_not_deleted(zoo_of_horrors, tmp_path, name):
    before = left(zoo_of_horrors)
    done = detr("runs", "rm", "good", name, "--yes")
    assert done.error(2)
    assert left(zoo_of_horrors) == before  # the good one neither
    assert (tmp_path / "outside" / "run.json").exists()


def test_a_path_through_a_link_is_not_deleted(copy, place, tmp_path, trained):
    import shutil

    real = shutil.copytree(trained, tmp_path / "elsewhere" / "run")
    (place / "away").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="elsewhere"):
        runs.remove(runs.find(str(place / "away" / "run")))
    assert (real / "run.json").exists()
    runs.remove(runs.find(str(real)))  # named itself, it is a run like others
    assert not real.exists()


def test_a_running_run_is_not_deleted(copy):
    folder = copy("busy", status="running")
    from detrcli.runs import lock

    with (folder / METRICS_FILE).open("ab") as held:
        lock.take(held, folder)
        assert "is running" in detr("runs", "rm", "busy", "--yes").error(2)
    assert folder.exists()


def test_what_holds_more_than_a_run_is_not_deleted(copy, place, tmp_path, monkeypatch):
    monkeypatch.chdir(copy("here"))
    with pytest.raises(UsageError, match="is around"):
        runs.remove(runs.find("here"))
    (place.parent / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(UsageError, match="is around"):
        runs.remove(runs.find(place.parent))
    assert runs.find("here").status == "finished"


def test_endless_names_are_cut(tmp_path):
    write_metrics(
        tmp_path, [{"step": i, "loss": 1.0, **{f"n{i}-{k}": 1.0 for k in range(300)}} for i in range(9)]
    )
    assert len({name for row in read_history(tmp_path).steps for name in row}) in range(400, 501)
