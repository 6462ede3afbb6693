"""Passes as data: every forward of the network in its order, what goes through it, what it sees.

The schedule says which blocks are denoised together; the plan adds the clean passes between them
and gives each part its view of the past. Pure functions of integers: `Plan.at(index)` gives any
pass directly, so a stream without end needs no list and a resumed one needs only its index.
Operations are a sum over a plan, training chooses windows of it, and what a stream does next can be
another plan: one that starts at a later block, with the past that is stored, or with none of it.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, count, groupby, islice
from typing import NamedTuple

from pipeline.schedule import BlockLayout, Schedule, Window
from wan.kv_cache import ContextPolicy, View


@dataclass(frozen=True)
class Part:
    """Blocks that go through the network together, and what they see (see `View`).

    `window` tells their levels; None is the clean pass of one finished block, whose keys and values
    enter the cache.
    """

    blocks: range
    view: View
    window: Window | None = None

    @property
    def frames(self) -> int:
        """Latent frames that go through the network."""
        return len(self.view.positions) - len(self.view.frames)

    @property
    def size(self) -> tuple[int, int, bool, int]:
        """Frames of the past, own frames, and whether it is a clean pass: what it computes.

        Then how many frames an averaged sink takes in, up to where that makes no difference.
        """
        averaged = min(self.view.averaged, len(self.view.positions))
        return len(self.view.frames), self.frames, self.window is None, averaged


@dataclass(frozen=True)
class Pass:
    """One forward of the network over the tokens of all its parts, in order.

    `stores`: the block that the cache holds from now on. A block that no later pass looks back at
    is stored by a pass without parts, which runs nothing.
    """

    index: int
    parts: tuple[Part, ...]
    stores: int | None = None

    @property
    def window(self) -> Window | None:
        """The window among the parts, if there is one; it is the last part."""
        return self.parts[-1].window if self.parts else None


Sizes = tuple[tuple[int, int, bool, int], ...]
"""Of the parts of a pass: passes of equal sizes are the same work."""


def sizes_of(parts: Sequence[Part]) -> Sizes:
    """The sizes of a pass over these parts."""
    return tuple(part.size for part in parts)


@dataclass(frozen=True)
class Plan:
    """The passes of a schedule under a policy.

    A finished block is stored right before the first window that comes after it, since that is the
    first to look back at it: the clean pass of the last block is in no plan. Blocks from `stored`
    up to the schedule's first are given (a prefix) and stored before its first window.

    `origin`: the block at which the past begins (after a cut there is nothing before it); frames of
    views count from there.
    `stored`: the cache holds the blocks from `origin` up to this one already; by default none.
    `merged`: a clean pass shares its forward with the window behind it.
    """

    schedule: Schedule
    layout: BlockLayout
    policy: ContextPolicy
    origin: int = 0
    stored: int | None = None
    merged: bool = False

    def __post_init__(self) -> None:
        if not self.origin <= self._stored <= self.schedule.first_block:
            raise ValueError(
                f"blocks {self.origin} (origin), {self._stored} (stored) and "
                f"{self.schedule.first_block} (first to generate) have to come in this order"
            )

    def at(self, index: int) -> Pass | None:
        """Pass number `index`; None past the end."""
        if index < self._lead:
            block = self._stored + index
            return Pass(index, self._clean(block), stores=block)
        number, offset, windows = self._segment(index - self._lead)
        opens = number > 0 and offset == 0
        stores = self.schedule.first_block + number - 1 if opens else None
        alone = number > 0 and not self.merged  # the clean pass is one of its own
        window = self.schedule.window(windows + max(0, offset - 1) if alone else windows + offset)
        if window is None:  # nothing comes after the clean pass either
            return None
        if stores is not None and alone:
            return Pass(index, self._clean(stores), stores)
        if self.merged and window.index == 0 and self._stored < self.schedule.first_block:
            stores = self.schedule.first_block - 1
        clean = () if stores is None else self._clean(stores)
        return Pass(index, (*clean, self._windowed(window)), stores)

    def __iter__(self) -> Iterator[Pass]:
        return self.passes()

    def passes(self, start: int = 0) -> Iterator[Pass]:
        """The passes from number `start` on, in order."""
        while (found := self.at(start)) is not None:
            yield found
            start += 1

    def windows(self, start: int = 0) -> Iterator[Window]:
        """The windows from pass `start` on, in order."""
        return (found.window for found in self.passes(start) if found.window is not None)

    def restarted(self, block: int, *, stored: int, scene: bool = False) -> "Plan":
        """The plan that goes on at `block`, none of whose levels are done.

        `stored`: the cache holds the blocks before this one. With `scene` the past begins at
        `block`, and nothing is stored.
        """
        schedule = replace(self.schedule, first_block=block)
        if scene:
            return replace(self, schedule=schedule, origin=block, stored=block)
        return replace(self, schedule=schedule, stored=stored)

    def recache(self, finished: int) -> Iterator[tuple[int, Part]]:
        """Clean passes that store anew what is read of the first `finished` frames of the past.

        In order, each with its first frame; it sees what it saw but for frames that are no longer
        stored. Of a block of which only some frames are stored these alone go through the network.
        """
        frames = self.policy.stored(finished, self.layout.block_frames)
        oldest = finished - self.policy.recent_capacity(self.layout.block_frames)
        begin = self.layout.start(self.origin)

        def run(place: int) -> tuple[int, int]:  # stored frames of one block lie side by side
            return self.layout.block_of(begin + frames[place]), frames[place] - place

        for (block, _), places in groupby(range(len(frames)), run):
            own = [frames[place] for place in places]
            view = self.policy.view(own[0], len(own), clean_pass=True, oldest=oldest)
            yield own[0], Part(range(block, block + 1), view)

    @property
    def period(self) -> int:
        """Passes from one finished block to the next, once the first one is there."""
        return self._windows_per_block + (0 if self.merged else 1)

    def first_repetition(self) -> int:
        """The first pass from which on every block's passes have the sizes of the one before.

        From there on every block is the same work. Raises ValueError for a plan that ends before.
        """
        for index in count():
            passes = list(islice(map(self.at, count(index)), 2 * self.period))
            if any(found is None for found in passes):
                raise ValueError("this plan ends before its passes repeat")
            sizes = [sizes_of(found.parts) for found in passes if found is not None]
            if sizes[: self.period] == sizes[self.period :]:
                return index
        raise AssertionError("counting does not end")

    def is_steady(self, parts: Sequence[Part]) -> bool:
        """Whether a pass over these parts has the sizes of one that comes back with every block."""
        return sizes_of(parts) in self._steady_sizes

    def steady_passes(self) -> list[Pass]:
        """The passes of one block of an endless video, once its past is full.

        All those of a full schedule are alike: its first one.
        """
        if self.schedule.kind == "full":
            return list(islice(self.passes(), 1))
        schedule = Schedule(self.schedule.kind, self.schedule.num_levels)
        endless = replace(self, schedule=schedule, origin=0, stored=None)
        kept = self.policy.sink_frames + self.policy.max_frames
        blocks = self.layout.blocks_for(kept) + schedule.num_levels
        first = schedule.num_levels + blocks * endless.period
        return list(islice(endless.passes(first), endless.period))

    @cached_property
    def _steady_sizes(self) -> frozenset[Sizes]:
        return frozenset(sizes_of(own.parts) for own in self.steady_passes())

    @property
    def _stored(self) -> int:
        return self.origin if self.stored is None else self.stored

    @cached_property
    def _lead(self) -> int:
        """Passes before the first window: clean ones of given blocks."""
        given = self.schedule.first_block - self._stored
        return max(0, given - 1) if self.merged else given

    @property
    def _windows_per_block(self) -> int:
        """Windows from one finished block to the next, where all blocks have all levels."""
        return 1 if self.schedule.kind == "rolling" else self.schedule.num_levels

    def _segment(self, index: int) -> tuple[int, int, int]:
        """Of a pass behind the lead: its segment, its place there, and the windows before it.

        Segment 0 are the windows that finish the first block; each later one is the clean pass of
        the block before and the windows that finish the next.
        """
        first, levels = self.schedule.num_levels, self._own_levels
        if levels is not None:
            number = bisect_right(levels.starts, index) - 1
            return number, index - levels.starts[number], levels.windows[number]
        if index < first:
            return 0, index, 0
        number, offset = divmod(index - first, self.period)
        return number + 1, offset, first + number * self._windows_per_block

    @cached_property
    def _own_levels(self) -> "_Segments | None":
        """Where segments begin if blocks have levels of their own."""
        levels = self.schedule.block_levels
        if levels is None:
            return None
        windows = [0, *accumulate(levels[self.schedule.first_block :])]
        cleans = 0 if self.merged else 1
        return _Segments(windows, [n + cleans * max(0, i - 1) for i, n in enumerate(windows)])

    def _frame(self, block: int) -> int:
        """First latent frame of a block, counted from where the past begins."""
        return self.layout.start(block) - self.layout.start(self.origin)

    def _clean(self, block: int) -> tuple[Part, ...]:
        start, frames = self._frame(block), self.layout.frames(block)
        if not self.policy.reads(start, frames):
            return ()
        return (Part(range(block, block + 1), self.policy.view(start, frames, clean_pass=True)),)

    def _windowed(self, window: Window) -> Part:
        start, frames = (
            self._frame(window.first_block),
            list(map(self.layout.frames, window.blocks)),
        )
        blocks = [] if self.schedule.kind == "full" else frames
        return Part(window.blocks, self.policy.view(start, sum(frames), blocks=blocks), window)


class _Segments(NamedTuple):
    """For each segment: windows before it, and its first pass."""

    windows: list[int]
    starts: list[int]
