"""Schedules as data: which blocks each forward pass denoises together, each at which level.

Pure functions of integers. `Schedule.window(index)` gives any window directly, so an unbounded
schedule needs no list and a resumed one needs only its index.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError

ScheduleKind = Literal["rolling", "block", "full"]


@dataclass(frozen=True)
class Window:
    """One forward pass: blocks `first_block ... first_block + len(levels) - 1` at `levels`."""

    index: int
    first_block: int
    levels: tuple[int, ...]

    @property
    def blocks(self) -> range:
        """The blocks, in order of time."""
        return range(self.first_block, self.first_block + len(self.levels))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.blocks, self.levels, strict=True)


@dataclass(frozen=True)
class Schedule:
    """The sequence of windows over blocks `first_block ... num_blocks - 1`, T = `num_levels`.

    - `rolling` (Rolling Forcing, arXiv 2509.25161): window w holds blocks
      `max(0, w-T+1) ... min(N-1, w)`, block b at level `w - b`.
    - `block` (Self Forcing, arXiv 2506.08009): for each block, T windows of that block alone.
    - `full`: all blocks together, T windows (a bidirectional model; needs `num_blocks`).

    `num_blocks` counts from block 0; None never ends. Blocks before `first_block` are given.
    With `block_levels` (schedule `block` only) block b has that many levels of its own: it stops
    early, at its last one.
    """

    kind: ScheduleKind
    num_levels: int
    num_blocks: int | None = None
    first_block: int = 0
    block_levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind == "full" and self.num_blocks is None:
            raise ValueError("a full schedule needs a number of blocks")
        if self.block_levels is not None and self.kind != "block":
            raise ValueError("only the block schedule lets blocks stop early")

    def window(self, index: int) -> Window | None:
        """Window `index`, or None past the end."""
        return getattr(self, f"_{self.kind}")(index)

    def __iter__(self) -> Iterator[Window]:
        index = 0
        while (window := self.window(index)) is not None:
            yield window
            index += 1

    def finishes(self, window: Window) -> tuple[int, ...]:
        """Blocks that leave `window` clean."""
        return tuple(block for block, level in window if level == self.levels_of(block) - 1)

    def levels_of(self, block: int) -> int:
        """How many levels a block goes through."""
        return self.num_levels if self.block_levels is None else self.block_levels[block]

    def _rolling(self, index: int) -> Window | None:
        newest = index
        if self.num_blocks is not None:
            newest = min(index, self.num_blocks - self.first_block - 1)
        oldest = max(0, index - self.num_levels + 1)
        if oldest > newest:
            return None
        levels = tuple(index - block for block in range(oldest, newest + 1))
        return Window(index, self.first_block + oldest, levels)

    def _block(self, index: int) -> Window | None:
        if self.block_levels is None:
            offset, level = divmod(index, self.num_levels)
            block = self.first_block + offset
        else:
            block, level = self.first_block, index
            while block < len(self.block_levels) and level >= self.block_levels[block]:
                level -= self.block_levels[block]
                block += 1
        if self.num_blocks is not None and block >= self.num_blocks:
            return None
        return Window(index, block, (level,))

    def _full(self, index: int) -> Window | None:
        if index >= self.num_levels or self.num_blocks is None:
            return None
        return Window(index, self.first_block, (index,) * (self.num_blocks - self.first_block))


@dataclass(frozen=True)
class BlockLayout:
    """Where blocks lie: `block_frames` latent frames each; the first one may be a single frame."""

    block_frames: int
    independent_first_frame: bool = False

    def frames(self, block: int) -> int:
        """Latent frames of one block."""
        return 1 if self.independent_first_frame and block == 0 else self.block_frames

    def start(self, block: int) -> int:
        """First latent frame of a block: the frames of all blocks before it."""
        if not self.independent_first_frame or block == 0:
            return block * self.block_frames
        return 1 + (block - 1) * self.block_frames

    def block_of(self, frame: int) -> int:
        """The block that a latent frame belongs to."""
        return self.blocks_for(frame + 1) - 1

    def blocks_for(self, frames: int) -> int:
        """Blocks needed to hold `frames` latent frames."""
        if not self.independent_first_frame:
            return -(-frames // self.block_frames)
        return 1 + -(-(frames - 1) // self.block_frames)

    def require_full_blocks(self, frames: int) -> int:
        """Blocks that `frames` latent frames fill; UserError if the last one is not full."""
        blocks = self.blocks_for(frames)
        if frames < 1 or self.start(blocks) != frames:
            raise UserError(
                f"{frames} latent frames do not fill whole blocks of {self.block_frames}"
            )
        return blocks
