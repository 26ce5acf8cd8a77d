"""What ranks run that send a signal to their parent; apart from the tests, so that they need not load what these do."""

from __future__ import annotations

import os
import signal
import time


def send(number, value=None):
    os.kill(os.getppid(), number)
    time.sleep(0.2)
    return value


class Sent:
    """A value that sends the signal when it is unpickled, while the rank still loads."""

    def __init__(self, number, value):
        self.number, self.value = number, value

    def __reduce__(self):
        return send, (self.number, self.value)


def deaf():
    """Asked twice to end, it does not."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    time.sleep(60)
