"""One video while it is made: its timings, and a line that shows them."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm

TITLE_LENGTH = 24
LINE = "{desc} |{bar}| {n:.1f}/{total:.1f} s{postfix}"
SECONDS_BETWEEN_LINES = {True: 0.1, False: 10.0}
"""How often the line is renewed: in a terminal, and in a log, where every renewal stays."""


class VideoProgress:
    """Times one video and shows, on stderr, how much of it is there and how fast it comes.

    Use as a context manager around the making. Speeds are end to end: all the time since `start`,
    with the VAE and the writing of the file, but for what is `paused`.
    """

    def __init__(self, title: str, frames: int, fps: float, *, start: float, shown: bool) -> None:
        """`frames` to come, played at `fps`; `start` on the clock of `time.perf_counter`."""
        self.frames = 0
        self.fps = fps
        self._start = start
        self._first_frame_s: float | None = None
        self._end: float | None = None
        self._bar = tqdm(
            total=frames / fps,
            desc=title[:TITLE_LENGTH].rstrip(),
            bar_format=LINE,
            miniters=0,
            mininterval=SECONDS_BETWEEN_LINES[sys.stderr.isatty()],
            disable=not shown,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end = self._elapsed()
        self._bar.close()

    def add(self, frames: int) -> None:
        """So many more frames are there."""
        elapsed = self._elapsed()
        if self._first_frame_s is None:
            self._first_frame_s = elapsed
        self.frames += frames
        self._bar.set_postfix_str(speed(self.frames / elapsed, self.fps), refresh=False)
        self._bar.update(frames / self.fps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count, around what looks at the video."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def timings(self) -> dict[str, float]:
        """Seconds to the first frame and until the end, and the frames per second until then."""
        elapsed = self._elapsed() if self._end is None else self._end
        first = {} if self._first_frame_s is None else {"first_frame_s": self._first_frame_s}
        return {**first, "total_s": elapsed, "fps": self.frames / elapsed}

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start


def speed(rate: float, fps: float) -> str:
    """`rate` frames per second in words, also as a multiple of playing at `fps`."""
    return f"{rate:.1f} FPS, {rate / fps:.2f}x real time"
