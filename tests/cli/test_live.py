"""Progress of a training: on a real terminal it moves, elsewhere it is lines; the facts are the same."""

from __future__ import annotations

import gc
import mmap
import os
import re
import sys

import pytest

from detrcli.cli import live
from detrcli.cli.live import Facts
from detrcli.data.shapes import write_shapes
from detrcli.train.loop import Step
from tests.cli.run import detr

pty = pytest.importorskip("pty", reason="no terminals of this kind here")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toys"
    write_shapes(folder, "easy", train=12, val=2)
    return folder


def on_a_terminal(*args, cwd):
    """The exit code, and everything the terminal was sent."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(cwd)
        os.environ.update(COLUMNS="110", LINES="40", TERM="xterm-256color", OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, "-m", "detrcli", *map(str, args)])
    sent = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        sent += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sent.decode()


def settled(sent):
    """What stays on the terminal: lines that were not drawn over."""
    rows, at = [""], 0
    for piece in re.findall(r"\x1b\[\d*A|\x1b\[\d*K|\x1b\[[\d;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", sent):
        if piece == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif piece.endswith("A") and piece.startswith("\x1b"):
            at -= int(piece[2:-1] or 1)
        elif piece.endswith("K") and piece.startswith("\x1b"):
            rows[at] = ""
        elif not piece.startswith("\x1b") and piece != "\r":
            rows[at] += piece
    return [row for row in rows if row.strip()]


def test_a_terminal_shows_what_goes_on_and_keeps_the_lines_that_last(toys, tmp_path):
    code, sent = on_a_terminal(
        "train", toys, "-m", "detr/tiny", "--batch-size", "4", "--epochs", "3", cwd=tmp_path
    )
    assert code == 0, sent
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", sent)
    for fact in (
        r"\d/9 · epoch \d/3 · left \d",
        r"loss \d",
        "ce ",
        "giou ",
        r"lr \d",
        "it/s",
        r"data \d+%",
        "GB",
        r"AP \d\.\d{3} \(best",
    ):
        assert re.search(fact, plain), fact
    stays = settled(sent)
    assert not [row for row in stays if "it/s" in row]
    assert len([row for row in stays if re.match(r"step \d+: AP ", row)]) == 3
    assert stays[-1].startswith("next: ")
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h")  # the cursor is back


def test_a_mistake_on_a_terminal_leaves_it_as_it_was(toys, tmp_path):
    code, sent = on_a_terminal(
        "train", toys, "-m", "detr/tiny", "--lr", "1e30", "--batch-size", "4", "--set", "recipe.clip_norm=1e30",
        "--set", "recipe.warmup_steps=0", "--epochs", "3", cwd=tmp_path,
    )  # fmt: skip
    assert code == 1
    assert "not finite" in settled(sent)[-2]
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h")


def test_elsewhere_progress_is_whole_lines(toys, tmp_path):
    done = detr("train", toys, "-m", "detr/tiny", "--batch-size", "4", "--epochs", "2", cwd=tmp_path)
    assert done.code == 0
    assert "\x1b" not in done.err
    assert "\r" not in done.err
    assert done.err.count(": AP ") == 2


def step(number):
    terms = {"ce_0": 9.0, "ce": 1.0 + number, "giou": 0.5}
    return Step(
        number=number, epoch=0, loss=2.0 + number, terms=terms, lr=1e-4, grad_norm=1, seconds=0.5, waited=0.05
    )


def test_a_line_has_every_fact(monkeypatch, capsys):
    monkeypatch.setattr(live, "EVERY", 0.0)
    monkeypatch.setattr(live, "memory", lambda device: 1.25)
    facts = Facts(steps=100, epochs=10, steps_per_epoch=10, done=0, device="cpu", last_ap=0.2, best_ap=0.3)
    for number in range(12):
        facts.done = number + 1
        facts.recent.append(step(number))
    live._Lines().show(facts)
    assert capsys.readouterr().err == (
        "step 12/100 epoch 2/10 loss 7.500 (ce 6.500, giou 0.500) lr 0.0001 2.00 it/s data 10% 1.2 GB "
        "AP 0.200 (best 0.300) left 0:00:44\n"
    )


def test_memory_is_what_this_process_holds():
    gc.collect()  # what earlier tests left must not go meanwhile
    before = live.memory("cpu")
    with mmap.mmap(-1, 300_000_000) as held:  # pages of its own: the allocator may have kept freed ones
        for place in range(0, len(held), mmap.PAGESIZE):
            held[place] = 1
        assert live.memory("cpu") - before == pytest.approx(0.3, abs=0.1)
