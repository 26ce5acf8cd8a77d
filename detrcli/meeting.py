"""How the processes of one start find each other, whatever those before them left behind."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]  # documented, but not declared

from detrcli.errors import DetrError

PAUSE = 0.02  # seconds between two looks


class PeerError(DetrError):
    """Another process has gone, or does not answer."""


def agreed_name(store: Store, rank: int, world_size: int, seconds: float) -> str:
    """A name that the processes of this start have in common, and nobody before them had.

    torchrun gives the processes of a restart the store of those that died, with their addresses in it, and its count of restarts is
    not the same on all machines (pytorch#135712). So the first process calls by a new name; each other answers that call with a
    new name of its own; and only a confirmation that holds this name is of its time.
    """
    board, own = _Board(store, time.monotonic() + seconds), uuid.uuid4().hex
    if rank > 0:
        return board.wait("confirmed", lambda words: own in words, lambda: board.answer(rank, own))[0]
    board.write("call", own)
    answers = [board.wait(f"answer {n}", lambda words: words[:1] == [own]) for n in range(1, world_size)]
    board.write("confirmed", own, *(name for _, name in answers))
    return own


@dataclass(slots=True)
class _Board:
    """What stands in the store, as words."""

    store: Store
    deadline: float

    def write(self, key: str, *words: str) -> None:
        self.store.set(key, " ".join(words))

    def read(self, key: str) -> list[str]:
        return self.store.get(key).decode().split() if self.store.check([key]) else []

    def answer(self, rank: int, own: str) -> None:
        self.write(f"answer {rank}", *self.read("call"), own)

    def wait(
        self, key: str, right: Callable[[list[str]], bool], between: Callable[[], None] = lambda: None
    ) -> list[str]:
        """The words under a key once they are right."""
        while time.monotonic() < self.deadline:
            between()
            if right(words := self.read(key)):
                return words
            time.sleep(PAUSE)
        raise PeerError(
            "not all processes have come",
            hint="see what the others say; DETR_TIMEOUT is how long they may take",
        )
