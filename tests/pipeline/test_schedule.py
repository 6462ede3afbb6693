"""Schedules and block layouts as tables."""

from itertools import islice

import pytest

from pipeline.schedule import BlockLayout, Schedule, Window

Table = list[tuple[int, tuple[int, ...]]]


def table(schedule: Schedule, count: int | None = None) -> Table:
    """First block and levels of each window."""
    return [(window.first_block, window.levels) for window in islice(schedule, count)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param(
            Schedule("rolling", 3, 5),
            [
                (0, (0,)),
                (0, (1, 0)),
                (0, (2, 1, 0)),
                (1, (2, 1, 0)),
                (2, (2, 1, 0)),
                (3, (2, 1)),
                (4, (2,)),
            ],
            id="ramp-up, steady state, ramp-down",
        ),
        pytest.param(
            Schedule("rolling", 5, 2),
            [(0, (0,)), (0, (1, 0)), (0, (2, 1)), (0, (3, 2)), (0, (4, 3)), (1, (4,))],
            id="shorter than T blocks",
        ),
        pytest.param(Schedule("rolling", 3, 1), [(0, (0,)), (0, (1,)), (0, (2,))], id="one block"),
        pytest.param(
            Schedule("rolling", 3, 6, first_block=2),
            [
                (2, (0,)),
                (2, (1, 0)),
                (2, (2, 1, 0)),
                (3, (2, 1, 0)),
                (4, (2, 1)),
                (5, (2,)),
            ],
            id="after a prefix",
        ),
        pytest.param(Schedule("rolling", 1, 3), [(0, (0,)), (1, (0,)), (2, (0,))], id="one level"),
        pytest.param(
            Schedule("block", 2, 3),
            [(0, (0,)), (0, (1,)), (1, (0,)), (1, (1,)), (2, (0,)), (2, (1,))],
            id="block by block",
        ),
        pytest.param(
            Schedule("block", 2, 3, first_block=2), [(2, (0,)), (2, (1,))], id="block, prefix"
        ),
        pytest.param(Schedule("full", 2, 3), [(0, (0, 0, 0)), (0, (1, 1, 1))], id="all together"),
        pytest.param(Schedule("rolling", 3, 2, first_block=2), [], id="only a prefix, rolling"),
        pytest.param(Schedule("block", 3, 2, first_block=2), [], id="only a prefix, block"),
    ],
)
def test_windows(schedule: Schedule, expected: Table) -> None:
    assert table(schedule) == expected
    assert schedule.window(len(expected)) is None
    assert schedule.window(len(expected) + 7) is None


@pytest.mark.parametrize("kind", ["rolling", "block"])
@pytest.mark.parametrize("first_block", [0, 2])
def test_unbounded_equals_bounded_but_for_the_end(kind: str, first_block: int) -> None:
    unbounded = Schedule(kind, 4, None, first_block)  # type: ignore[arg-type]
    bounded = table(Schedule(kind, 4, 12, first_block))[:8]  # type: ignore[arg-type]
    assert table(unbounded, 8) == bounded


def test_any_window_is_known_at_once() -> None:
    """An unbounded schedule may not need a list of what was before."""
    assert Schedule("rolling", 5).window(10**9) == Window(10**9, 10**9 - 4, (4, 3, 2, 1, 0))
    assert Schedule("block", 4).window(10**9 + 2) == Window(10**9 + 2, 250_000_000, (2,))


@pytest.mark.parametrize("kind", ["rolling", "block", "full"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_every_block_goes_through_every_level_once(kind: str, num_blocks: int, levels: int) -> None:
    schedule = Schedule(kind, levels, num_blocks)  # type: ignore[arg-type]
    seen: dict[int, list[int]] = {block: [] for block in range(num_blocks)}
    finished: list[int] = []
    for index, window in enumerate(schedule):
        assert window.index == index
        assert list(window.blocks) == [block for block, _ in window]
        for block, level in window:
            seen[block].append(level)
        finished += schedule.finishes(window)
    assert all(visits == list(range(levels)) for visits in seen.values())
    assert finished == list(range(num_blocks))


def test_full_schedule_needs_an_end() -> None:
    with pytest.raises(ValueError, match="number of blocks"):
        Schedule("full", 3)


@pytest.mark.parametrize(
    ("layout", "frames", "starts"),
    [
        (BlockLayout(3), [3, 3, 3], [0, 3, 6]),
        (BlockLayout(1), [1, 1, 1], [0, 1, 2]),
        (BlockLayout(3, independent_first_frame=True), [1, 3, 3], [0, 1, 4]),
    ],
)
def test_blocks_lie_end_to_end(layout: BlockLayout, frames: list[int], starts: list[int]) -> None:
    assert [layout.frames(block) for block in range(3)] == frames
    assert [layout.start(block) for block in range(3)] == starts
    for block in range(10):
        assert layout.start(block + 1) == layout.start(block) + layout.frames(block)


@pytest.mark.parametrize("block_frames", [1, 2, 3])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("frames", range(1, 12))
def test_blocks_needed_hold_the_frames(block_frames: int, independent: bool, frames: int) -> None:
    layout = BlockLayout(block_frames, independent)
    blocks = layout.blocks_for(frames)
    assert layout.start(blocks) >= frames
    assert layout.start(blocks - 1) < frames
