"""Runs a training in forked children and hits them, from one process that has loaded everything once.

    python -m tests.train.forked stop DATA OUT SEED TIMES      SIGTERM at random moments, then to the end
    python -m tests.train.forked both DATA OUT SEED TIMES      SIGTERM and SIGKILL by turns

A moment is counted in what the child has done, so that a slow machine is hit in the same places as a fast one. A run that
ends before all hits were made is followed by another, in OUT/hit-0, OUT/hit-1 and so on.
Prints a line of JSON: the exit codes, and the longest that a child took to end once it was hit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from detrcli.train.plan import Request
from detrcli.train.run import train

SIGNALS = {"stop": [signal.SIGTERM], "both": [signal.SIGTERM, signal.SIGKILL]}
# as small as it can be: most of the time goes into starting and saving
SMALL = {"model.width": 16, "model.heads": 2, "model.ffn": 16, "model.decoder_layers": 1}


def begin(request: Request, out: Path) -> int:
    """A forked child that trains. This process never does: threads that it had would be missing in its children."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        done = train(request, out=out, resume="auto")
        code = 128 + done.stopped_by if done.stopped_by else 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def written(run: Path) -> int:
    """Lines of the record: one a step, one an evaluation."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hit(pid: int, number: int, run: Path, draw: random.Random) -> tuple[int, float]:
    """Send the signal some steps from now, or while it starts: the exit code, 0 where it was done before, and the seconds that
    it took to end."""
    steps = draw.randint(0, 3)
    there = written(run) + steps
    while steps and written(run) < there:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05 if steps else 0.5))  # computing, saving, scoring; or loading, resuming
    os.kill(pid, number)
    begun = time.monotonic()
    return ended(pid), time.monotonic() - begun


def main(how: str, data: str, out: str, seed: str, times: str) -> None:
    torch.set_num_threads(1)
    request = Request(
        data=data,
        model="detr/tiny",
        batch_size=4,
        epochs=6,
        device="cpu",
        ema=0.9,
        eval_every=3,
        save_every=0.0,
        changes=SMALL,
    )
    draw, numbers = random.Random(int(seed)), SIGNALS[how]
    assert ended(begin(request, Path(out) / "straight")) == 0
    codes: list[int] = []
    longest = 0.0
    while (hits := len(codes) - codes.count(0)) < int(times) or codes[-1] != 0:
        run = Path(out) / f"hit-{codes.count(0)}"  # after one that is done another
        pid = begin(request, run)
        if hits < int(times):
            code, took = hit(pid, numbers[hits % len(numbers)], run, draw)
            longest = max(longest, took)
        else:
            code = ended(pid)
        codes.append(code)
        assert code != 1, codes
    print(json.dumps({"codes": codes, "longest": longest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
