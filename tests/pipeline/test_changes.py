"""Changes of prompt and seed: when they are heard, what the past becomes, how they are recorded."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from pipeline import VideoPipeline, load_pipeline
from pipeline.changes import Change, Direction, Timeline
from pipeline.rollout import Rollout
from pipeline.schedule import BlockLayout
from pipeline.stream import Stream
from tests.conftest import TinyWorld
from tests.tiny_pipeline import random_dit
from tests.tiny_rollout import TinyMethod, new_rollout, some_text, tiny_method
from utils.config import load_config
from utils.errors import UserError
from utils.images import to_uint8
from utils.noise import CounterNoise
from wan.context import CachedContext
from wan.dit import WanDiT
from wan.geometry import VideoShape

METHODS = ("rolling", "self with sink", "infinite")


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    return random_dit(seed=5)


@pytest.fixture(scope="module")
def pipe(tiny_world: TinyWorld) -> VideoPipeline:
    return load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu")


def directed(
    dit: WanDiT, method: TinyMethod, blocks: int | None = None, rows: int = 1, **options: Any
) -> Direction:
    text = some_text(dit, range(rows))
    return Direction(new_rollout(dit, method, blocks, text=text, **options), text)


def next_block(direction: Direction) -> Tensor | None:
    """The next finished block, with the changes that wait for it."""
    while True:
        direction.prepare()
        result = direction.rollout.step()
        if result is None or result.finished:
            return None if result is None else next(iter(result.finished.values()))


def take(direction: Direction, count: int) -> list[Tensor]:
    blocks = [next_block(direction) for _ in range(count)]
    assert all(block is not None for block in blocks)
    return [block for block in blocks if block is not None]


def stored(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Keys and values of all frames that a later pass may read."""
    cache = rollout.cache
    frames = rollout.plan.policy.stored(cache.finished, rollout.layout.block_frames)
    slots = cache.slots(frames)
    layers = [cache.layer(layer).read(slots) for layer in range(rollout.dit.config.num_layers)]
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])


# --- the past under another text ------------------------------------------------------------------


@pytest.mark.parametrize("context_noise", [0.0, 50.0])
@pytest.mark.parametrize("name", METHODS)
def test_a_recached_past_is_that_of_a_rollout_that_heard_nothing_else(
    dit: WanDiT, name: str, context_noise: float
) -> None:
    """While all frames are stored: fed into an empty cache under the new text, sink included."""
    method = tiny_method(name)
    direction = directed(dit, method, context_noise=context_noise)
    blocks = take(direction, 3)
    before = [x.clone() for x in stored(direction.rollout)]
    new = some_text(dit, [7])
    direction.add(new, policy="recache")
    direction.prepare()
    fed = new_rollout(dit, method, 4, text=new, prefix=blocks[:2], context_noise=context_noise)
    while fed.cache.finished < direction.rollout.cache.finished:
        fed.index += fed._run(fed.plan.at(fed.index), grad=False) is None  # type: ignore[arg-type]
    for ours, theirs, old in zip(stored(direction.rollout), stored(fed), before, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(ours, old, atol=1e-2)


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_long_past_is_made_again_from_what_is_stored(dit: WanDiT, name: str, block: int) -> None:
    """By the definition: clean passes in order, true frame numbers, without what has gone."""
    direction = directed(dit, tiny_method(name, block))
    take(direction, 9)
    rollout = direction.rollout
    cache, policy, finished = rollout.cache, rollout.plan.policy, rollout.cache.finished
    frames = policy.stored(finished, block)
    assert frames != tuple(range(finished))
    latents = {frame: cache.latents((frame,)).clone() for frame in frames}
    new = some_text(dit, [7])
    direction.add(new, policy="recache")
    direction.prepare()

    kept: list[int] = []
    fed = new_rollout(dit, tiny_method(name, block), None, text=new)
    for first in frames:
        if first in kept:
            continue
        own = [f for f in frames if f >= first and f // block == first // block]
        if own != list(range(first, first + len(own))):
            own = [f for i, f in enumerate(own) if f == first + i]
        view = policy.view(first, len(own), clean_pass=True)
        seen = [f for f in view.frames if f in kept]
        shift = [view.positions[view.frames.index(f)] for f in seen]
        positions = (*shift, *view.positions[len(view.frames) :])
        if policy.sink_position == "contiguous":
            positions = tuple(range(len(seen) + len(own)))
        least = min(positions)
        _feed(
            fed,
            view._replace(frames=tuple(seen), positions=tuple(p - least for p in positions)),
            first,
            torch.cat([latents[f] for f in own], dim=1),
        )
        kept += own
    fed.cache.seek(finished)
    for ours, theirs in zip(stored(rollout), stored(fed), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def _feed(rollout: Rollout, view: Any, first: int, clean: Tensor) -> None:
    """A clean pass of frames `first ...` that sees `view`, straight into the cache."""
    rollout.cache.seek(first)
    context = CachedContext(
        rollout.cache, view, rollout.grid, rollout.dit.config.head_dim, write=True
    )
    rollout.dit(clean, torch.zeros(clean.shape[:2]), rollout.text, context)
    rollout.cache.commit(clean)


def test_the_rows_of_a_batch_change_alone(dit: WanDiT) -> None:
    """Each video of a batch is the one that it would be alone, whatever changes in the others."""
    method = tiny_method("rolling")
    both = directed(dit, method, rows=2)
    alone = [
        Direction(new_rollout(dit, method, None, text=t), t)
        for t in some_text(dit, [0, 1]).split(1)
    ]
    for direction in (both, *alone):
        take(direction, 4)
    both.add(some_text(dit, [7]), policy="recache", row=1)
    both.add(some_text(dit, [8]), policy="keep", blend_blocks=2, row=0)
    alone[1].add(some_text(dit, [7]), policy="recache")
    alone[0].add(some_text(dit, [8]), policy="keep", blend_blocks=2)
    for _ in range(4):
        block = next_block(both)
        assert block is not None
        for row, direction in enumerate(alone):
            own = next_block(direction)
            assert own is not None
            assert torch.allclose(block[row], own[0], atol=1e-4)
    assert [change.row for change in both.changes] == [1, 0]


def test_guidance_leaves_the_unconditional_rows_their_text(dit: WanDiT) -> None:
    """The new text is that of the conditional rows; with the old text again nothing changes."""
    text, negative = some_text(dit, [0]), some_text(dit, [3])

    def guided() -> Direction:
        rollout = new_rollout(
            dit,
            tiny_method("rolling"),
            None,
            text=torch.cat([text, negative]),
            rows=1,
            guidance_scale=3.0,
        )
        return Direction(rollout, text, negative)

    kept, changed, back = guided(), guided(), guided()
    for direction in (kept, changed, back):
        take(direction, 3)
    changed.add(some_text(dit, [7]), policy="recache")
    back.add(some_text(dit, [7]))
    back.add(text)
    expected, other, same = (next_block(direction) for direction in (kept, changed, back))
    assert expected is not None
    assert other is not None
    assert same is not None
    assert torch.equal(same, expected)
    assert not torch.allclose(other, expected, atol=1e-3)


# --- when a change is heard -----------------------------------------------------------------------


def hearing(direction: Direction, blocks: int, shares: bool = False) -> dict[int, set[float]]:
    """Which texts the passes of each block hear, as the mean of the text's first layer."""
    heard: dict[int, set[float]] = {}
    rollout = direction.rollout
    while (rollout.next_block or 0) < blocks:
        direction.prepare()
        window = rollout.next_window
        if window is None:
            break
        for block, level in window:
            if level == 0:
                heard[block] = set()
            heard.setdefault(block, set()).add(round(rollout.text.keys[0].double().sum().item(), 6))
        rollout.step()
    return heard


@pytest.mark.parametrize("policy", ["keep", "recache", "renoise", "cut"])
@pytest.mark.parametrize("after", [0, 1, 6, 9])
@pytest.mark.parametrize("name", ["rolling", "infinite"])
def test_a_change_says_when_it_is_heard(dit: WanDiT, name: str, after: int, policy: Any) -> None:
    """At the start, in the middle, and where no block begins any more (10 blocks, 3 levels)."""
    direction = directed(dit, tiny_method(name), 10)
    heard: dict[int, set[float]] = {}
    if after:
        heard = hearing(direction, after)
    old = round(direction.rollout.text.keys[0].double().sum().item(), 6)
    change = direction.add(some_text(dit, [7]), policy=policy)
    for block, texts in hearing(direction, 10).items():
        heard[block] = (
            texts if block in (change.whole_from or 99,) else heard.get(block, set()) | texts
        )
        if change.restarts and block >= after:
            heard[block] = texts
    new = round(direction.rollout.text.keys[0].double().sum().item(), 6)
    first = min(block for block, texts in heard.items() if new in texts)
    whole = [block for block, texts in heard.items() if texts == {new}]
    assert (change.block, change.first_block) == (after, first)
    assert change.whole_from == min(whole, default=None)
    assert old != new
    assert change.status == "applied"


def test_blocks_in_flight_start_again_and_cost_windows(dit: WanDiT) -> None:
    """T - 1 windows without a block in a rolling window, none where blocks come one by one."""
    for name, cost in (("rolling", 2), ("infinite", 0)):
        for policy in ("renoise", "cut"):
            direction = directed(dit, tiny_method(name))
            take(direction, 5)
            windows = len(list(_until(direction, 6)))
            change = direction.add(some_text(dit, [7]), policy=policy)  # type: ignore[arg-type]
            direction.prepare()
            assert change.windows_without_block == cost
            assert len(list(_until(direction, 6))) == windows + cost


def _until(direction: Direction, block: int) -> Iterator[int]:
    for window in direction.rollout.coming_windows():
        if window.first_block >= block:
            return
        yield window.first_block


@pytest.mark.parametrize("policy", ["keep", "cut"])
def test_a_change_does_not_enter_a_block_that_an_error_left_half_made(
    dit: WanDiT, policy: Any
) -> None:
    """It was heard by the block's later windows alone, or dropped another; no replay did so."""
    halted, plain = (directed(dit, tiny_method("infinite"), 6) for _ in range(2))
    for direction in (halted, plain):
        take(direction, 2)
        direction.add(some_text(dit, [5]), policy="cut")
    halted.prepare()
    halted.rollout.step()  # the next window fails
    late = halted.add(some_text(dit, [7]), policy=policy)
    again = directed(dit, tiny_method("infinite"), 6)
    again.load_state_dict(halted.state_dict())
    again.rollout.load_state_dict(halted.rollout.state_dict())
    blocks = [take(direction, 1)[0] for direction in (halted, again, plain)]
    plain.add(some_text(dit, [7]), policy=policy)
    for block, own in enumerate((halted, again)):
        assert torch.equal(blocks[block], blocks[2])
        assert own.changes[-1].block == 2
    for expected in take(plain, 2):
        assert torch.equal(take(halted, 1)[0], expected)
    assert (late.block, late.whole_from) == (3, 3)
    assert [change.record() for change in halted.changes] == [c.record() for c in plain.changes]
    last = directed(dit, tiny_method("infinite"), 1)
    last.prepare()
    with pytest.raises(UserError, match="ends before"):
        last.add(some_text(dit, [7]))


def test_a_blend_goes_on_in_the_form_of_the_stream_that_loads_it(dit: WanDiT) -> None:
    """Its texts stayed as the saved stream had them: on a GPU, beside a text that was not."""
    direction = directed(dit, tiny_method("rolling"))
    direction.add(some_text(dit, [7]), blend_blocks=3)
    take(direction, 1)
    text = some_text(dit, [0]).double()
    other = Direction(new_rollout(dit, tiny_method("rolling"), None, text=text.float()), text)
    other.load_state_dict(direction.state_dict())
    other.rollout.load_state_dict(direction.rollout.state_dict())
    assert torch.allclose(take(other, 1)[0], take(direction, 1)[0], atol=1e-5)


def test_a_renoised_block_has_its_own_noise_and_a_scene_has_no_past(dit: WanDiT) -> None:
    """A cut is a video that begins, with the noise of its blocks' numbers; the seed may change."""

    class Shifted:
        def __call__(self, sample: int, block: int, level: int) -> Tensor:
            return CounterNoise(0, (16, 4, 6), 2)(sample, block + 5, level)

    method, new = tiny_method("rolling"), some_text(dit, [7])
    cut = directed(dit, method)
    take(cut, 5)
    cut.add(new, policy="cut")
    fresh = Direction(new_rollout(dit, method, None, text=new, source=Shifted()), new)
    for ours, theirs in zip(take(cut, 8), take(fresh, 8), strict=True):
        assert torch.equal(ours, theirs)
    assert cut.scenes == (0, 5)


def test_a_new_seed_counts_for_blocks_that_have_not_begun(dit: WanDiT) -> None:
    direction = directed(dit, tiny_method("rolling"))
    take(direction, 4)
    change = direction.add(None, seed=9)
    direction.prepare()
    noise = direction.rollout.noise
    assert change.whole_from == change.first_block == 6
    assert [first for first, _ in noise.sources] == [0, 6]
    other = directed(dit, tiny_method("rolling"), seed=9).rollout.noise
    assert torch.equal(noise(6, 0), other(6, 0))
    assert not torch.equal(noise(5, 2), other(5, 2))


def test_a_blend_goes_in_equal_steps_and_recaches_at_its_end(dit: WanDiT) -> None:
    direction = directed(dit, tiny_method("rolling"))
    take(direction, 3)
    old, new = direction.text.clone(), some_text(dit, [7])
    change = direction.add(new, policy="recache", blend_blocks=3)
    shares = []
    for _ in range(3):
        take(direction, 1)
        shares.append(((direction.text - old).norm() / (new - old).norm()).item())
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=1e-4)
    past = stored(direction.rollout)[0].clone()
    direction.prepare()
    assert torch.equal(direction.text, new)
    assert not torch.allclose(stored(direction.rollout)[0], past)
    assert (change.first_block, change.whole_from) == (3, 8)


def test_of_changes_before_one_window_the_last_one_counts(dit: WanDiT) -> None:
    """What is replaced before it was heard is not made and not recorded; the others are."""
    direction = directed(dit, tiny_method("rolling"), rows=2)
    take(direction, 3)
    first = direction.add(some_text(dit, [4]), policy="cut", prompt="a")
    second = direction.add(some_text(dit, [5]), row=0, prompt="b")
    third = direction.add(some_text(dit, [6, 7]), policy="renoise", prompt="c")
    seed = direction.add(None, seed=3)
    last = direction.add(some_text(dit, [8]), row=1, prompt="d")
    assert [c.status for c in (first, second)] == ["superseded", "superseded"]
    assert direction.pending == [third, seed, last]
    assert (last.first_block, last.whole_from) == (3, 3)  # the blocks start again anyway
    take(direction, 1)
    assert direction.changes == [third, seed, last]
    assert torch.equal(direction.text, some_text(dit, [6, 8]))
    assert direction.scenes == (0,)
    assert third.record() == {"block": 3, "prompt": "c", "policy": "renoise", "blend_blocks": 0}


def test_a_change_that_failed_half_way_is_made_to_its_end(
    dit: WanDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of the past is under its text already, so another change cannot replace it unheard."""
    direction = directed(dit, tiny_method("rolling"))
    take(direction, 3)
    first = direction.add(some_text(dit, [4]), policy="recache", prompt="a")
    with monkeypatch.context() as patch:
        patch.setattr(direction.rollout, "recache", Mock(side_effect=MemoryError("full")))
        with pytest.raises(MemoryError):
            direction.prepare()
    second = direction.add(some_text(dit, [5]), prompt="b")
    take(direction, 1)
    assert direction.changes == [first, second]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"blend_blocks": 1001}, "number of blocks up to 1000"),
        ({"policy": "later"}, "policy must be one of keep, recache, renoise, cut"),
        ({"policy": "cut", "blend_blocks": 2}, "can blend"),
        ({"blend_blocks": -1}, "blend_blocks must be a number of blocks"),
        ({"blend_blocks": 1.5}, "blend_blocks must be a number of blocks"),
        ({"row": 2}, "row must be one of the 2 videos"),
        ({"row": 0, "policy": "cut"}, "share their windows"),
        ({"row": 1, "seed": 4}, "share their windows"),
        ({"text": None}, "say what changes"),
        ({"text": 3}, "text must be 1 or 2 rows, not 3"),
    ],
)
def test_impossible_changes_are_refused_in_one_sentence(
    dit: WanDiT, options: dict[str, Any], word: str
) -> None:
    direction = directed(dit, tiny_method("rolling"), rows=2)
    rows = options.pop("text", 1)
    text = None if rows is None else some_text(dit, range(rows))
    with pytest.raises(UserError, match=word):
        direction.add(text, **options)
    assert direction.pending == []


def test_what_has_no_next_scene_or_no_end_says_so(dit: WanDiT) -> None:
    single = directed(dit, tiny_method("rolling", independent_first_frame=True))
    with pytest.raises(UserError, match="use renoise instead of cut"):
        single.add(some_text(dit), policy="cut")
    ended = directed(dit, tiny_method("rolling"), 3)
    take(ended, 3)
    with pytest.raises(UserError, match="ends before"):
        ended.add(some_text(dit))


# --- streams --------------------------------------------------------------------------------------


def frames_of(stream: Stream, blocks: int, *, at: int = -1, **change: Any) -> list[Tensor]:
    """Frames of the next blocks; the change is made before block `at`."""
    frames = []
    for number in range(blocks):
        if number == at:
            stream.set_prompt(**change)
        block = stream.next_block()
        assert block is not None
        frames.append(block)
    return frames


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"policy": "keep"},
        {"policy": "keep", "blend_blocks": 2},
        {"policy": "recache"},
        {"policy": "recache", "blend_blocks": 1},
        {"policy": "renoise"},
        {"policy": "cut", "seed": 8},
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_a_changed_stream_is_the_same_before_and_every_time(
    pipe: VideoPipeline, change: dict[str, Any]
) -> None:
    """Bit-equal before the change to the video without it, and from run to run, saved or not."""
    with pipe.stream("a red ball", seed=1) as stream:
        plain = frames_of(stream, 6)
    runs = []
    for _ in range(2):
        with pipe.stream("a red ball", seed=1) as stream:
            runs.append(frames_of(stream, 6, at=3, prompt="a blue ball", **change))
    with pipe.stream("a red ball", seed=1) as stream, pipe.stream("x", seed=1) as other:
        frames_of(stream, 3)
        stream.set_prompt("a blue ball", **change)
        frames_of(stream, 1)
        other.load_state_dict(stream.state_dict())
        resumed = frames_of(other, 2)
        assert [c.record() for c in other.changes] == [c.record() for c in stream.changes]
    for ours, without in zip(runs[0][:3], plain, strict=False):
        assert torch.equal(ours, without)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][4:], resumed, strict=True))
    assert not torch.equal(runs[0][3][:5], plain[3][:5])
    assert len(runs[0][3]) == (9 if change["policy"] == "cut" else 12)


def test_a_scene_has_no_ghost_of_the_one_before(pipe: VideoPipeline) -> None:
    """After a cut the decoder starts afresh, too: the same latents give the same frames."""
    with pipe.stream("a red ball", seed=1) as stream:
        frames_of(stream, 2)
        stream.set_prompt("a blue ball", "cut")
        item = stream._open().peek()
        assert item is not None
        alone = pipe.vae.decode(item[1])
        frames = stream.next_block()

    assert frames is not None
    assert torch.equal(frames, to_uint8(alone)[0])


@pytest.mark.slow
def test_a_branch_is_what_a_rebuilt_stream_is(pipe: VideoPipeline) -> None:
    """Cache and decoder made anew from a small state: as the same rule at the same block gives."""
    with (
        pipe.stream("a red ball", seed=1) as stream,
        pipe.stream("a red ball", seed=1) as replayed,
        pipe.stream("other", seed=1) as branch,
    ):
        frames_of(stream, 9)
        state = stream.branch_state()
        frames_of(stream, 2)
        branch.load_state_dict(state)
        frames_of(replayed, 9)
        replayed.rebuild()
        for direction in (branch, replayed):
            direction.set_prompt("a blue ball", seed=4)
        ours, theirs = (frames_of(one, 5) for one in (branch, replayed))
        records = [change.record() for change in branch.changes]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [record["policy"] for record in records] == ["branch", "keep"]


def test_a_branch_of_nothing_is_the_video_itself(pipe: VideoPipeline) -> None:
    """Before the first block there is no past, and looking for it was an error."""
    with pipe.stream("a", seed=1) as stream, pipe.stream("b", seed=1) as branch:
        branch.load_state_dict(stream.branch_state())
        stream.rebuild()
        pairs = zip(frames_of(branch, 2), frames_of(stream, 2), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_frames_that_do_not_reach_the_host_are_decoded_again(
    pipe: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder had gone on: the next try showed the block as if it came twice."""
    with pipe.stream("a", seed=1) as stream:
        plain = frames_of(stream, 3)
    with pipe.stream("a", seed=1) as stream:
        frames_of(stream, 1)
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.stream.to_host", Mock(side_effect=torch.OutOfMemoryError))
            with pytest.raises(torch.OutOfMemoryError):
                stream.next_block()
        pairs = zip(frames_of(stream, 2), plain[1:], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("merged", ["true", "false"])
def test_an_error_within_a_step_leaves_the_stream_before_it(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, merged: str
) -> None:
    """Whichever call of the network or the decoder fails, the next try makes the same frames."""
    pipe = load_pipeline(
        tiny_world.config, tiny_world.checkpoint, "cpu", [f"merge_clean_pass={merged}"]
    )

    def frames(every: int | None) -> tuple[list[Tensor], int]:
        calls = failures = 0

        def counted(what: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls, failures
                calls += 1
                result = what(*args, **kwargs)
                if every is not None and calls % every == 0:
                    failures += 1
                    raise torch.OutOfMemoryError("full")
                return result

            return call

        enlarging = pipe.vae.model.decoder.up_blocks[0].upsamplers[0].resample[1]
        parts = [*pipe.dit.blocks, enlarging]
        made: list[Tensor] = []
        with monkeypatch.context() as patch:
            for module in parts:
                patch.setattr(module, "forward", counted(module.forward))
            with pipe.open_stream(pipe.encode_prompts(["a"]), seed=1, repeatable=True) as stream:
                while len(made) < 12:
                    if len(made) == 8 and not (stream.changes or stream.pending):
                        stream.set_prompt("b", "recache")
                    with suppress(torch.OutOfMemoryError):
                        made += [block for block in [stream.next_block()] if block is not None]
        return made, failures

    expected, _ = frames(None)
    ours, failures = frames(17)
    assert failures > 3
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_change_whose_text_fails_is_heard_at_the_next_try(
    dit: WanDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as heard, and everything went on under the old prompt."""
    direction = directed(dit, tiny_method("rolling"))
    take(direction, 3)
    direction.add(some_text(dit, [7]), prompt="b")
    with monkeypatch.context() as patch:
        patch.setattr(dit, "encode_text", lambda _: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            direction.prepare()
    direction.prepare()
    assert [change.status for change in direction.changes] == ["applied"]
    expected = dit.encode_text(some_text(dit, [7])).keys[0]
    assert torch.equal(direction.rollout.text.keys[0], expected)


def test_changes_on_record_are_all_made(dit: WanDiT) -> None:
    """Those of a block that an error had left half made: the last one replaced the others."""
    direction = directed(dit, tiny_method("rolling"))
    take(direction, 3)
    for text, policy in ((7, "recache"), (8, "keep")):
        direction.add(some_text(dit, [text]), prompt="b", policy=policy, replaces=False)  # type: ignore[arg-type]
    direction.prepare()
    assert [change.policy for change in direction.changes] == ["recache", "keep"]


@pytest.mark.slow
def test_merged_clean_passes_move_the_last_bits_at_most(tiny_world: TinyWorld) -> None:
    """Through every policy, a blend, a seed, what is made anew, and the tries after an error."""

    def latents(merged: str) -> tuple[Tensor, int]:
        given = [f"merge_clean_pass={merged}"]
        pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", given)
        forwards = 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        pipe.dit.register_forward_hook(count)
        made: list[Tensor] = []
        with pipe.stream("a", seed=1) as stream:
            directed = (
                ("b", "keep", 2, None),
                ("c", "recache", 1, None),
                ("d", "renoise", 0, 7),
                (None, "keep", 0, 8),
                ("e", "cut", 0, None),
            )
            for prompt, policy, blend, seed in directed:
                item = stream._latents.peek() if stream._latents else None
                assert item is not None
                made += [item[1], *(block.float() for block in frames_of(stream, 2))]
                stream.set_prompt(prompt, policy, blend, seed=seed)
            stream.rebuild()
            state = stream.branch_state()
            made += [block.float() for block in frames_of(stream, 3)]
            stream.load_state_dict(state)
            made += [block.float() for block in frames_of(stream, 3)]
        return torch.cat([x.flatten() for x in made]), forwards

    (ours, fewer), (expected, more) = latents("true"), latents("false")
    assert fewer < more - 10
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1  # frames are uint8
    assert (ours != expected).float().mean() < 0.02


def test_a_state_of_other_weights_is_refused(tiny_world: TinyWorld, pipe: VideoPipeline) -> None:
    other = load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu", use_ema=True)
    with pipe.stream("a", seed=1) as stream, other.stream("a", seed=1) as opened:
        stream.next_block()
        with pytest.raises(ValueError, match="other weights"):
            opened.load_state_dict(stream.state_dict())


def test_a_state_whose_decoder_does_not_fit_changes_nothing(pipe: VideoPipeline) -> None:
    """The latents were another stream's by then."""
    with pipe.stream("a", seed=1) as stream, pipe.stream("b", seed=1) as opened:
        stream.next_block()
        state = stream.state_dict()
        with pytest.raises(ValueError, match="start the stream again"):
            opened.load_state_dict(state | {"decoder": {"features.0": torch.empty(0)}})
        assert (opened.next_index, opened.rollout.index) == (0, 0)


def test_prefixes_and_single_first_frames_change_like_the_others(
    tiny_world: TinyWorld,
) -> None:
    """With a video to continue, and where the first frame is a block of its own."""

    values = {"independent_first_frame": True, "i2v": True}
    config = load_config(
        tiny_world.config, [f"{k}={str(v).lower()}" for k, v in values.items()][:1]
    )
    single = load_pipeline(config, tiny_world.checkpoint, device="cpu")
    image = torch.full((32, 48, 3), 90, dtype=torch.uint8)
    with single.stream("a", seed=1, image=image) as stream:
        stream.next_block()
        change = stream.set_prompt("b", "renoise")
        assert (change.block, change.whole_from) == (1, 1)
        assert [len(block) for block in frames_of(stream, 3)] == [12, 12, 12]
        assert stream.timeline.start(3) == 25


# --- time -----------------------------------------------------------------------------------------


def test_blocks_lie_in_the_video_as_they_are_decoded() -> None:
    shape = VideoShape(32, 48)
    timeline = Timeline(BlockLayout(3), shape)
    assert [timeline.start(block) for block in range(4)] == [0, 9, 21, 33]
    cut = timeline.with_cuts([Change(2, policy="cut"), Change(5, policy="cut"), Change(3)])
    assert [cut.start(block) for block in range(7)] == [0, 9, 21, 30, 42, 54, 63]
    assert [cut.frames(block) for block in (1, 2, 3, 5)] == [12, 9, 12, 9]
    assert [cut.block_from(frame) for frame in (0, 1, 9, 9.5, 21, 22, 54, 200.0)] == [
        *(0, 1, 1, 2, 2, 3, 5),
        next(block for block in range(99) if cut.start(block) >= 200),
    ]
    assert cut.latent_frames(63) == 18
    single = Timeline(BlockLayout(3, independent_first_frame=True), shape)
    assert [single.start(block) for block in range(3)] == [0, 1, 13]
