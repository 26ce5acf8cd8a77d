"""Runs a training in forked children and kills them, from one process that has loaded everything once.

    python -m tests.train.forked kill DATA OUT SEED TIMES      SIGKILL after random times, then to the end
    python -m tests.train.forked stop DATA OUT SEED TIMES      SIGTERM after random times, then to the end
    python -m tests.train.forked both DATA OUT SEED TIMES      one and the other by turns

A run that ends before all hits were made is followed by another, in OUT/hit-0, OUT/hit-1 and so on.
Prints a line of JSON: how often a child was hit, the exit codes, and the longest that one took to end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from detrcli.train.plan import Request
from detrcli.train.run import train

SIGNALS = {
    "kill": [signal.SIGKILL],
    "stop": [signal.SIGTERM],
    "both": [signal.SIGTERM, signal.SIGKILL],
}


def begin(request: Request, out: Path) -> int:
    """A forked child that trains. This process never does: threads that it had would be missing in its children."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        done = train(request, out=out, resume="auto")
        code = 128 + done.stopped_by if done.stopped_by else 0
    finally:
        os._exit(code)


def main(how: str, data: str, out: str, seed: str, times: str) -> None:
    torch.set_num_threads(1)
    request = Request(
        data=data, model="detr/tiny", batch_size=4, epochs=6, device="cpu", ema=0.9, save_every=0.0
    )
    draw, numbers = random.Random(int(seed)), SIGNALS[how]
    os.waitpid(begin(request, Path(out) / "straight"), 0)
    codes, longest, hits, ended = [], 0.0, 0, 0
    while hits < int(times) or codes[-1] != 0:
        pid = begin(request, Path(out) / f"hit-{ended}")
        if hits < int(times):
            hits += 1
            time.sleep(draw.uniform(0.05, 1.2))
            os.kill(pid, numbers[hits % len(numbers)])
        begun = time.monotonic()
        _, status = os.waitpid(pid, 0)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] == 0:
            ended += 1  # the next one begins anew
        else:
            longest = max(longest, time.monotonic() - begun)
        assert len(codes) < 10 * int(times) + 10, codes
    print(json.dumps({"hits": hits, "codes": codes, "longest": longest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
