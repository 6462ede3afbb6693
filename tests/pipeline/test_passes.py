"""Plans of passes: their order, any of them by its number, and other plans than a first one."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.passes import Pass, Plan
from pipeline.schedule import BlockLayout, Schedule
from tests.tiny_pipeline import random_dit
from tests.tiny_rollout import LATENT, LoggingDiT, new_rollout, run, some_text, tiny_method
from wan.kv_cache import ContextPolicy
from wan.rope import rotation

METHODS = ["rolling", "self", "self with sink", "infinite"]
ALL = ContextPolicy(0, 99)


def plan_of(schedule: Schedule, policy: ContextPolicy = ALL, **options: Any) -> Plan:
    return Plan(schedule, BlockLayout(2), policy, **options)


def told(own: Pass) -> str:
    """`c3 w2:10 >3`: a clean pass of block 3, a window from block 2 on; block 3 is stored."""
    parts = [
        f"c{part.blocks[0]}"
        if part.window is None
        else f"w{part.blocks[0]}:{''.join(map(str, part.window.levels))}"
        for part in own.parts
    ]
    return " ".join([*parts, *([] if own.stores is None else [f">{own.stores}"])])


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        pytest.param(
            plan_of(Schedule("rolling", 2, 3)),
            ["w0:0", "w0:10", "c0 >0", "w1:10", "c1 >1", "w2:1"],
            id="rolling",
        ),
        pytest.param(
            plan_of(Schedule("block", 2, 2)),
            ["w0:0", "w0:1", "c0 >0", "w1:0", "w1:1"],
            id="block by block",
        ),
        pytest.param(
            plan_of(Schedule("block", 3, 3, block_levels=(2, 1, 3))),
            ["w0:0", "w0:1", "c0 >0", "w1:0", "c1 >1", "w2:0", "w2:1", "w2:2"],
            id="blocks that stop early",
        ),
        pytest.param(plan_of(Schedule("full", 2, 2)), ["w0:00", "w0:11"], id="all blocks together"),
        pytest.param(
            plan_of(Schedule("rolling", 2, 4, first_block=2)),
            ["c0 >0", "c1 >1", "w2:0", "w2:10", "c2 >2", "w3:1"],
            id="after a prefix",
        ),
        pytest.param(
            plan_of(Schedule("rolling", 2, 5, first_block=3), stored=2),
            ["c2 >2", "w3:0", "w3:10", "c3 >3", "w4:1"],
            id="blocks in flight begin again, the past is stored",
        ),
        pytest.param(
            plan_of(Schedule("rolling", 2, 5, first_block=3), origin=3),
            ["w3:0", "w3:10", "c3 >3", "w4:1"],
            id="a cut",
        ),
        pytest.param(
            plan_of(Schedule("block", 1, 3), ContextPolicy(2, 2)),
            ["w0:0", "c0 >0", "w1:0", ">1", "w2:0"],
            id="a block that nobody reads",
        ),
        pytest.param(
            plan_of(Schedule("rolling", 2, 5, first_block=2), merged=True),
            ["c0 >0", "c1 w2:0 >1", "w2:10", "c2 w3:10 >2", "c3 w4:1 >3"],
            id="merged",
        ),
        pytest.param(
            plan_of(Schedule("block", 2, 3, block_levels=(2, 1, 1)), merged=True),
            ["w0:0", "w0:1", "c0 w1:0 >0", "c1 w2:0 >1"],
            id="merged, blocks that stop early",
        ),
    ],
)
def test_order(plan: Plan, expected: list[str]) -> None:
    assert [told(own) for own in plan] == expected
    assert [plan.at(index) for index in range(len(expected))] == list(plan)
    assert plan.at(len(expected)) is None
    assert plan.at(len(expected) + 5) is None


def test_any_pass_is_found_at_once_and_late_ones_are_like_early_ones() -> None:
    """Pass 10^12 of a stream, without counting up to it."""
    policy = ContextPolicy(2, 12, clean_pass_sees_sink=False)
    plan = plan_of(Schedule("rolling", 3), policy)
    start, far = plan.first_repetition(), 10**12
    for early in map(plan.at, range(start, start + plan.period)):
        assert early is not None
        late = plan.at(early.index + far * plan.period)
        assert late is not None
        assert [len(p.view.frames) for p in late.parts] == [len(p.view.frames) for p in early.parts]
        assert [p.blocks[0] - far for p in late.parts] == [p.blocks[0] for p in early.parts]


def test_the_first_repetition_is_where_every_view_is_full() -> None:
    policy = ContextPolicy(2, 12, clean_pass_sees_sink=False)
    plan = plan_of(Schedule("rolling", 3), policy)
    passes = list(islice(plan, 60))
    sizes = [[len(part.view.positions) for part in own.parts] for own in passes]
    start = plan.first_repetition()
    assert (
        sizes[start:]
        == sizes[start : start + 2] * ((60 - start) // 2) + sizes[start : start + (60 - start) % 2]
    )
    assert sizes[start - 1] != sizes[start + 1]
    with pytest.raises(ValueError, match="ends before"):
        plan_of(Schedule("rolling", 3, 4), policy).first_repetition()


def test_views_count_from_where_the_past_begins() -> None:
    """After a cut the first block has the view of a first block, whatever its number."""
    policy = ContextPolicy(2, 12)
    first = list(plan_of(Schedule("rolling", 3, 6), policy))
    cut = list(plan_of(Schedule("rolling", 3, 16, first_block=10), policy, origin=10))
    assert [p.view for own in cut for p in own.parts] == [
        p.view for own in first for p in own.parts
    ]
    with pytest.raises(ValueError, match="in this order"):
        plan_of(Schedule("rolling", 3, 6, first_block=2), origin=3)


# --- the engine runs any plan --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "guidance"),
    [*((name, first, None) for name in METHODS for first in (0, 2)), ("rolling", 2, 3.0)],
)
def test_merged_passes_give_the_same_video(name: str, first: int, guidance: float | None) -> None:
    """In one forward fewer a block; only the sizes of the matrix products differ."""
    dit = random_dit(num_layers=2)
    method = tiny_method(name)
    draw = torch.Generator().manual_seed(0)
    prefix = [torch.randn(1, 2, *LATENT, generator=draw) for _ in range(first)]
    alone, shared = LoggingDiT(dit), LoggingDiT(dit)
    text = None if guidance is None else some_text(dit, (0, 1))
    options = {"prefix": prefix, "text": text, "rows": 1, "guidance_scale": guidance}
    expected = run(new_rollout(alone, method, 7, **options))
    rollout = new_rollout(shared, method, 7, **options)
    rollout.plan = replace(rollout.plan, merged=True)
    blocks = run(rollout)
    assert blocks.keys() == expected.keys()
    for block, latents in expected.items():
        torch.testing.assert_close(blocks[block], latents, atol=1e-5, rtol=0)
    cleans = len(alone.clean_passes)
    assert len(shared.calls) == len(alone.calls) - cleans + max(0, first - 1)


def test_a_cut_is_a_plan_of_its_own() -> None:
    """With an empty cache it is the first video of those blocks' noise, to the last bit."""
    dit = random_dit(num_layers=1)
    method = tiny_method("rolling")

    def rolled(origin: int) -> dict[int, Tensor]:
        rollout = new_rollout(dit, method, None, source=SameNoise())
        schedule = Schedule("rolling", method.levels, origin + 5, origin)
        rollout.plan = replace(rollout.plan, schedule=schedule, origin=origin)
        rotation.cache_clear()
        return run(rollout)

    first, cut = rolled(0), rolled(9)
    assert list(cut) == [block + 9 for block in first]
    assert all(torch.equal(cut[block + 9], latents) for block, latents in first.items())


class SameNoise:
    """Noise that does not tell blocks apart."""

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        return torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(level))
