"""`detr runs` as people type it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from detrcli import runs
from detrcli.cli.complete import run_names
from tests.cli.run import detr


def test_runs_are_listed_newest_first(copy):
    copy("old", started_at="2026-01-01T00:00:00+00:00")
    copy("new", started_at="2026-02-01T00:00:00+00:00")
    table = detr("runs", "list").out
    assert table.index("new") < table.index("old")
    listed = detr("runs", "list", "--json").json["runs"]
    assert [run["name"] for run in listed] == ["new", "old"]
    assert listed[0]["model"] == "detr/tiny"
    assert listed[0]["steps"] == 10
    assert listed[0]["bytes"] > 100_000


def test_no_runs_is_no_error():
    done = detr("runs", "list")
    assert done.code == 0
    assert "detr train shapes" in done.err


def test_a_run_is_shown_with_what_to_do_next(copy):
    copy("one")
    copy("two", status="interrupted")
    done = detr("runs", "show", "one")
    assert "detr/tiny" in done.out
    assert "--weights" in done.err
    assert "--resume" in detr("runs", "show", "two").err
    facts = detr("runs", "show", "one", "--json").json
    assert facts["settings"]["recipe.batch_size"] == 4
    assert facts["settings"]["model.num_queries"]
    assert facts["environment"]["packages"]["torch"]


def test_a_mistyped_run_has_a_nearest_name(copy):
    copy("detr-tiny-toys-1")
    done = detr("runs", "show", "detr-tiny-toy-1")
    assert "no run 'detr-tiny-toy-1'" in done.error(2)
    assert "detr-tiny-toys-1" in done.err


def test_compared_runs_show_what_differs(copy, tmp_path):
    copy("a")
    other = copy("b", best_ap=0.5)
    config = (other / "config.toml").read_text()
    changed = config.replace("lr = 0.001\n", "lr = 3e-5\n").replace('ema = "none"\n', "ema = 0.9\n")
    (other / "config.toml").write_text(changed)
    facts = detr("runs", "compare", "a", "b", "--json").json
    assert facts["settings"] == {"ema": ["none", 0.9], "recipe.lr": [0.001, 3e-5]}
    done = detr("runs", "compare", "a", "b", "--html", "page.html", "--png", "curves.png", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "0.500" in done.out
    assert "3e-05" in done.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.html").read_text()
    assert "recipe.lr" in page
    assert page.count("<polyline") >= 6  # two runs: loss, AP, rate
    assert "two runs" in detr("runs", "compare", "a").error(2)


def test_a_picture_has_a_pictures_name(copy, tmp_path):
    copy("a")
    copy("b")
    (tmp_path / "notes.txt").write_text("mine")
    words = ("runs", "compare", "a", "b")
    assert "--png writes a .png file" in detr(*words, "--png", "notes.txt", cwd=tmp_path).error(2)
    assert "--html writes a .html file" in detr(
        "runs", "show", "a", "--html", "notes.txt", cwd=tmp_path
    ).error(2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_duration_is_the_time_in_which_it_ran(copy, toys, tmp_path):
    """Hours between an end and a resumption are none of it; a run from before it was counted has its start and end."""
    old = copy("old", started_at="2026-01-01T00:00:00+00:00", finished_at="2026-01-01T01:02:03+00:00")
    about = json.loads((old / "run.json").read_text())
    del about["seconds"]
    (old / "run.json").write_text(json.dumps(about))
    assert "1:02:03" in detr("runs", "show", "old").out
    run = tmp_path / "run"
    words = ("train", toys, "-m", "detr/tiny", "--batch-size", "4", "--steps", "1", "--out", run)
    assert detr(*words).code == 0
    about = json.loads((run / "run.json").read_text())
    assert 0 < about["seconds"] < 100
    gone = {
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:00:09+00:00",
        "seconds": 200,
    }
    (run / "run.json").write_text(json.dumps(about | gone))
    assert detr("train", "--resume", run, "--steps", "2").code == 0
    assert 200 < detr("runs", "show", run, "--json").json["seconds"] < 300
    assert re.search(r"duration: +0:0[34]:", detr("runs", "show", run).out)


def test_names_of_runs_are_completed_without_torch(copy):
    copy("detr-1")
    copy("other")
    assert run_names("detr") == ["detr-1"]
    code = (
        "import sys; from detrcli.cli.app import app\n"
        "for args in (['runs', 'list'], ['runs', 'show', 'detr-1'], ['runs', 'compare', 'detr-1', 'other', '--html', '/dev/null']):\n"
        "    try: app(args)\n"
        "    except SystemExit as end: assert not end.code, args\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("/dev/null", str(runs.root("") / "c.html"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_is_read_from_python(copy):
    copy("mine")
    run = runs.find("mine")
    assert (
        run.best_ap == run.history().evaluations[-1]["ap"]
        or run.best_ap == run.history().evaluations[0]["ap"]
    )
    assert run.history().curve("loss")[0] == list(range(10))
    assert "ce" in run.history().terms
