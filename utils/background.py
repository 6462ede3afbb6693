"""Work that is done beside its caller: by one thread, in order, and never far behind."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Background:
    """A thread that does one piece of work after the other while its caller goes on.

    Use as a context manager. With more than `waiting` pieces behind the one that is being done, the
    caller waits. An error is raised at the next `do`, or when the block is left; what comes behind
    it is not done. When the block is left normally, all is done first; after an exception what
    waits is dropped, and the piece that is being done comes to its end, whatever interrupts.
    """

    def __init__(self, waiting: int = 2) -> None:
        self._waiting = waiting
        self._thread = ThreadPoolExecutor(1)
        self._pieces: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._pieces and error is None:
                self._pieces.popleft().result()
        finally:
            self._end()

    def do(self, work: Callable[[], object]) -> None:
        """Have it done behind all that was given before."""
        while len(self._pieces) > self._waiting or (self._pieces and self._pieces[0].done()):
            self._pieces.popleft().result()
        before = self._pieces[-1] if self._pieces else None
        self._pieces.append(self._thread.submit(_done, before, work))

    def _end(self) -> None:
        """Wait for the piece that is being done; an interruption meanwhile is raised afterwards."""
        try:
            self._thread.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            self._end()
            raise


def _done(before: Future[None] | None, work: Callable[[], object]) -> None:
    if before is not None:
        before.result()  # it has ended: raises its error, so that nothing follows it
    work()
