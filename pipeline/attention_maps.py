"""Attention maps of a running stream: what each block looks at, at every level on its way.

recorder = AttentionRecorder(pipe.layout, blocks=[20], levels=range(5), layers=range(30))
stream.rollout.wrap_context = recorder
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import nan

from torch import Tensor

from pipeline.schedule import BlockLayout, Window
from wan.context import AttentionContext, CachedContext
from wan.recording import RecordingContext

SINK, RECENT = "sink", "recent"


@dataclass(frozen=True)
class AttentionMap:
    """Where the queries of one block look in one layer at one level; all shares sum to 1.

    `past`: the frames of the cache in view, oldest first, of which the first `sink` are the sink;
    `past_masses`: the share of each. `window`: the blocks that are denoised together, and how many
    frames each has; `window_masses`: the share of each of these frames.
    """

    block: int
    level: int
    layer: int
    past: tuple[int, ...]
    past_masses: tuple[float, ...]
    sink: int
    window: tuple[tuple[int, int], ...]
    window_masses: tuple[float, ...]

    @property
    def groups(self) -> dict[str | int, tuple[float, int]]:
        """Share and number of frames of the sink, the recent frames, and each block of the window.

        Blocks are named by their distance to this one: -1 is the (cleaner) block before it.
        """
        groups: dict[str | int, tuple[float, int]] = {
            SINK: (sum(self.past_masses[: self.sink]), self.sink),
            RECENT: (sum(self.past_masses[self.sink :]), len(self.past) - self.sink),
        }
        start = 0
        for block, frames in self.window:
            share = sum(self.window_masses[start : start + frames])
            groups[block - self.block] = (share, frames)
            start += frames
        return {name: value for name, value in groups.items() if value[1]}


class AttentionRecorder:
    """Set as a rollout's `wrap_context`, it keeps the maps of the chosen blocks, levels, layers."""

    def __init__(
        self,
        layout: BlockLayout,
        *,
        blocks: Collection[int],
        levels: Collection[int],
        layers: Collection[int],
    ) -> None:
        self.layout = layout
        self.blocks, self.levels, self.layers = set(blocks), set(levels), set(layers)
        self.maps: list[AttentionMap] = []

    @property
    def complete(self) -> bool:
        """Whether every map that was asked for is there."""
        return len(self.maps) == len(self.blocks) * len(self.levels) * len(self.layers)

    def __call__(self, context: CachedContext, window: Window | None) -> AttentionContext:
        """The context of a pass, wrapped if one of its maps is wanted."""
        if window is None:
            return context
        wanted = [
            row
            for row, (block, level) in enumerate(window)
            if block in self.blocks and level in self.levels
        ]
        if not wanted:
            return context
        frames = [self.layout.frames(block) for block in window.blocks]

        def record(layer: int, masses: Tensor) -> None:
            for row in wanted:
                self._keep(context, window, row, layer, masses[row].tolist())

        return RecordingContext(context, frames, self.layers, record)

    def _keep(
        self, context: CachedContext, window: Window, row: int, layer: int, masses: list[float]
    ) -> None:
        past = context.view.frames
        self.maps.append(
            AttentionMap(
                block=window.blocks[row],
                level=window.levels[row],
                layer=layer,
                past=past,
                past_masses=tuple(masses[: len(past)]),
                sink=sum(frame < context.cache.sink_frames for frame in past),
                window=tuple((block, self.layout.frames(block)) for block in window.blocks),
                window_masses=tuple(masses[len(past) :]),
            )
        )


def group_names(maps: Sequence[AttentionMap]) -> list[str | int]:
    """All groups of the maps: sink, recent, then the blocks of the windows in order of time."""
    names = {name for entry in maps for name in entry.groups}
    words: list[str | int] = [name for name in (SINK, RECENT) if name in names]
    return words + sorted(name for name in names if isinstance(name, int))


def group_table(
    maps: Sequence[AttentionMap], names: Sequence[str | int], *, per_frame: bool = False
) -> list[list[float]]:
    """A row per map, a column per group: its share, or with `per_frame` against even attention.

    1 is then what each frame would get if all frames in view got as much. NaN where a group is not
    in view.
    """
    rows = []
    for entry in maps:
        seen = len(entry.past) + len(entry.window_masses)
        shares = entry.groups
        row = []
        for name in names:
            share, frames = shares.get(name, (nan, 1))
            row.append(share * seen / frames if per_frame else share)
        rows.append(row)
    return rows
