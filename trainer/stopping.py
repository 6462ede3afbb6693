"""Ending a training early, at a place where all ranks stand: signals, and a vote between passes."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.sharding import World


class StopRequested(Exception):
    """All ranks are to stop here; `number` is the signal that asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopping:
    """Whether the training is to end here: `look` stands between passes and between micro-batches.

    All ranks pass the same places in the same order, and a signal may reach one of them alone. So
    each place collects a vote, and acts on that of the place before: by then every rank has given
    it, unless one is behind by a whole pass. The votes travel between hosts (gloo), so no GPU is
    waited for.
    """

    def __init__(self, world: World) -> None:
        self.asked_by = 0  # the signal that asks this rank to stop
        self.places = 0  # passed so far
        self._group = world.new_group() if world.size > 1 else None
        self._vote: tuple[dist.Work, Tensor] | None = None
        self._is_main = world.is_main

    def look(self) -> None:
        """Raise StopRequested, on all ranks at the same place, if one of them was asked to stop."""
        self.places += 1
        number = self.asked_by if self._group is None else self._highest_before(self._group)
        if number:
            raise StopRequested(number)

    def _highest_before(self, group: dist.ProcessGroup) -> int:
        """The highest number that a rank gave at the last place; gives this rank's own."""
        own = torch.tensor(self.asked_by)
        before = self._vote
        self._vote = dist.all_reduce(own, dist.ReduceOp.MAX, group=group, async_op=True), own
        if before is None:
            return 0
        work, votes = before
        work.wait()
        return int(votes)

    @contextmanager
    def listening(self, otherwise: Callable[[], str]) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask to stop meanwhile; a second Ctrl-C ends the process at once.

        `otherwise`: what is left of the run if there is no time to write a state.
        """

        def remember(number: int, frame: FrameType | None) -> None:
            if self._is_main and not self.asked_by:
                with suppress(OSError):
                    name = signal.Signals(number).name
                    self._say(f"{name}: {self._course(number)}; {otherwise()}")
            self.asked_by = self.asked_by or number
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)

        before = {
            number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _course(number: int) -> str:
        again = " (Ctrl-C once more ends it at once)" if number == signal.SIGINT else ""
        return f"stopping before the next pass{again}, then a state is written"

    @staticmethod
    def _say(text: str) -> None:
        """Write a line; what interrupts a write of stderr may not use stderr itself."""
        os.write(2, f"\n{text}\n".encode())
