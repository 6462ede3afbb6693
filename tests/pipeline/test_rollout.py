"""The rollout engine: order and number of passes, batches, lengths, resuming, sampling."""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import diffusers
import pytest
import torch
from torch import Tensor

from model.self_rollout import RolloutDraw
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise, OdeStep, Renoise
from pipeline.schedule import BlockLayout, Schedule
from tests.reference_flow import euler_step
from tests.tiny_pipeline import random_dit
from tests.tiny_rollout import (
    GRID,
    LATENT,
    LoggingDiT,
    NumberedContext,
    TinyMethod,
    new_rollout,
    run,
    some_text,
    tiny_method,
)
from utils.noise import CounterNoise
from wan.context import ForcedContext, MaskedContext, frame_mask
from wan.dit import WanDiT
from wan.flow import add_noise, x0_from_flow
from wan.kv_cache import ContextPolicy, KVCache
from wan.rope import apply_rope, rotation

CPU = torch.device("cpu")
METHODS = ["rolling", "self", "self with sink", "infinite"]
ALL = [*METHODS, "averaged"]
# As sharp as it gets, but for the order of sums in differently shaped matrix products.
EXACT = 1e-5


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    return random_dit(num_layers=2)


def assert_close(ours: Tensor, theirs: Tensor, atol: float = EXACT) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def assert_same_blocks(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for block, latents in ours.items():
        assert_close(latents, theirs[block])


# --- passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_rolling_runs_no_pass_too_many(dit: WanDiT, num_blocks: int) -> None:
    """N+T-1 windows and N-1 clean passes: the last block's would be read by nobody."""
    log = LoggingDiT(dit)
    method = tiny_method("rolling")
    blocks = run(new_rollout(log, method, num_blocks))
    assert sorted(blocks) == list(range(num_blocks))
    assert len(log.windows) == num_blocks + method.levels - 1
    assert len(log.clean_passes) == num_blocks - 1


@pytest.mark.parametrize("name", ["self", "infinite"])
def test_blockwise_runs_no_pass_too_many(dit: WanDiT, name: str) -> None:
    log = LoggingDiT(dit)
    method = tiny_method(name)
    run(new_rollout(log, method, 5))
    assert len(log.windows) == 5 * method.levels
    assert len(log.clean_passes) == 4


def test_blocks_that_no_policy_reads_get_no_clean_pass(dit: WanDiT) -> None:
    """Without a sink, and with room for one block only, no pass ever looks back."""
    log = LoggingDiT(dit)
    method = TinyMethod("block", ContextPolicy(0, 2, "original"), BlockLayout(2))
    run(new_rollout(log, method, 3))
    assert len(log.windows) == 3 * method.levels
    assert log.clean_passes == []


@pytest.mark.parametrize("name", METHODS)
def test_a_block_is_handed_out_before_anything_else_runs(dit: WanDiT, name: str) -> None:
    """Neither its clean pass nor the next block is computed before the caller has it."""
    log = LoggingDiT(dit)
    method = tiny_method(name)
    rollout = new_rollout(log, method, None)
    for block in range(4):
        clean_before = len(log.clean_passes)
        while not (result := rollout.step()).finished:
            pass
        assert list(result.finished) == [block]
        assert len(log.clean_passes) == block
        assert clean_before == max(0, block - 1)
        assert log.calls[-1].clean_pass is False
        levels = method.levels
        windows = block + levels if name == "rolling" else (block + 1) * levels
        assert result.window.index + 1 == windows


@pytest.mark.parametrize("name", METHODS)
def test_clean_pass_gets_the_clean_block_at_context_noise(dit: WanDiT, name: str) -> None:
    log = LoggingDiT(dit)
    blocks = run(new_rollout(log, tiny_method(name), 4))
    for block, call in enumerate(log.clean_passes):
        assert torch.equal(call.latents, blocks[block])
        assert call.timesteps.unique().tolist() == [0]
        assert len(call.past) == 2 * block


def test_context_noise_is_added_before_the_clean_pass(dit: WanDiT) -> None:
    log = LoggingDiT(dit)
    method = tiny_method("self")
    blocks = run(new_rollout(log, method, 3, context_noise=40.0))
    source = CounterNoise(0, LATENT, 2)
    for block, call in enumerate(log.clean_passes):
        noise = source(0, block, method.levels)[None]
        timesteps = torch.full((1, 2), 40.0)
        assert torch.equal(call.timesteps, timesteps)
        assert torch.equal(call.latents, add_noise(blocks[block], noise, timesteps))


def test_window_frames_carry_their_levels(dit: WanDiT) -> None:
    log = LoggingDiT(dit)
    method = tiny_method("rolling")
    run(new_rollout(log, method, 4))
    high, middle, low = method.timesteps
    seen = [call.timesteps[0, ::2].tolist() for call in log.windows]
    for ours, expected in zip(
        seen,
        [[high], [middle, high], [low, middle, high], [low, middle, high], [low, middle], [low]],
        strict=True,
    ):
        assert ours == pytest.approx(expected)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_runs_on_request_only(name: str) -> None:
    dit = random_dit(num_layers=1).requires_grad_(True)
    method = tiny_method(name)
    rollout = new_rollout(dit, method, 4)
    with torch.no_grad():
        rollout.text = dit.encode_text(some_text(dit))
    for index in range(method.levels + 2):
        result = rollout.step(grad=index == method.levels + 1)
        assert result.x0.requires_grad is (index == method.levels + 1)
        assert not any(x.requires_grad for x in result.finished.values())
    result.x0.sum().backward()
    assert dit.head.head.weight.grad.abs().max() > 0
    state = rollout.state_dict()
    assert not state["cache"]["keys"].requires_grad
    assert not any(x.requires_grad for x in state["in_flight"].values())


# --- the definition, without a cache ------------------------------------------------------------


class ListedContext(NumberedContext):
    """Attention over listed past frames, with a softmax written out; remembers its own K/V."""

    def __init__(self, past: list[dict[int, tuple[Tensor, Tensor]]], positions: list[int]) -> None:
        self.past = past
        self.positions = tuple(positions)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.own[layer] = (k, v)
        keys = torch.cat([frame[layer][0] for frame in self.past] + [k], dim=1)
        values = torch.cat([frame[layer][1] for frame in self.past] + [v], dim=1)
        turn = rotation(self.positions, GRID, q.shape[-1], CPU)
        own = slice(-q.shape[1], None)
        q = apply_rope(q, turn[own])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, apply_rope(keys, turn)) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


class Definition:
    """A rollout as it is defined: lists of frames, and every clean pass anew for every window."""

    def __init__(self, dit: WanDiT, method: TinyMethod, text: Tensor) -> None:
        self.dit = dit
        self.method = method
        self.text = dit.encode_text(text)

    def frames_in_view(self, finished: int, queries: int, clean_pass: bool) -> list[int]:
        """The design's table: what a pass of Rolling Forcing sees of the past."""
        policy = self.method.policy
        everything = list(range(finished))
        if clean_pass:
            return everything[-(policy.max_frames - queries) :]
        sink = everything[: policy.sink_frames]
        room = policy.max_frames - policy.sink_frames - queries
        recent = [frame for frame in everything if frame >= policy.sink_frames]
        return sink + (recent[-room:] if room > 0 else [])

    def forward(self, latents: Tensor, timesteps: Tensor, memory: list, clean_pass: bool) -> Any:
        seen = self.frames_in_view(len(memory), latents.shape[1], clean_pass)
        positions = list(range(len(seen) + latents.shape[1]))
        context = ListedContext([memory[frame] for frame in seen], positions)
        return self.dit(latents, timesteps, self.text, context), context.own

    def remember(self, blocks: list[Tensor]) -> list[dict[int, tuple[Tensor, Tensor]]]:
        """Keys and values of every finished frame, by clean passes from the first block on."""
        memory: list[dict[int, tuple[Tensor, Tensor]]] = []
        for clean in blocks:
            frames = clean.shape[1]
            _, own = self.forward(clean, torch.zeros(clean.shape[:2]), memory, clean_pass=True)
            for i in range(frames):
                tokens = slice(i * GRID[0] * GRID[1], (i + 1) * GRID[0] * GRID[1])
                memory.append({n: (k[:, tokens], v[:, tokens]) for n, (k, v) in own.items()})
        return memory

    def windows(self, num_blocks: int) -> list[list[tuple[int, int]]]:
        """(block, level) of every window."""
        levels = self.method.levels
        if self.method.kind == "block":
            return [[(block, level)] for block in range(num_blocks) for level in range(levels)]
        return [
            [(b, w - b) for b in range(max(0, w - levels + 1), min(num_blocks - 1, w) + 1)]
            for w in range(num_blocks + levels - 1)
        ]

    def run(self, num_blocks: int, noise: BlockNoise) -> dict[int, Tensor]:
        timesteps = self.method.timesteps
        current = {block: noise(block, 0) for block in range(num_blocks)}
        finished: list[Tensor] = []
        for window in self.windows(num_blocks):
            inputs = [current[block] for block, _ in window]
            levels = [level for _, level in window]
            t = torch.cat(
                [
                    torch.full(x.shape[:2], timesteps[level])
                    for x, level in zip(inputs, levels, strict=True)
                ],
                dim=1,
            )
            latents = torch.cat(inputs, dim=1)
            flow, _ = self.forward(latents, t, self.remember(finished), clean_pass=False)
            x0 = x0_from_flow(latents, flow, t).split([x.shape[1] for x in inputs], dim=1)
            for (block, level), clean in zip(window, x0, strict=True):
                if level == self.method.levels - 1:
                    finished.append(clean)
                else:
                    later = torch.full(clean.shape[:2], timesteps[level + 1])
                    current[block] = add_noise(clean, noise(block, level + 1), later)
        return dict(enumerate(finished))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("block", [1, 2])
def test_rolling_equals_its_definition(dit: WanDiT, block: int, num_blocks: int) -> None:
    """Also for videos shorter than T blocks, where published code re-injects pure noise."""
    method = tiny_method("rolling", block)
    noise = BlockNoise(CounterNoise(5, LATENT, block), [0], "cpu")
    expected = Definition(dit, method, some_text(dit)).run(num_blocks, noise)
    assert_same_blocks(run(new_rollout(dit, method, num_blocks, seed=5)), expected)


def test_block_schedule_under_the_rolling_policy_equals_its_definition(dit: WanDiT) -> None:
    """Schedule and policy are independent; Rolling Forcing's training runs this mixture too."""
    method = replace(tiny_method("rolling"), kind="block")
    noise = BlockNoise(CounterNoise(5, LATENT, 2), [0], "cpu")
    expected = Definition(dit, method, some_text(dit)).run(8, noise)
    assert_same_blocks(run(new_rollout(dit, method, 8, seed=5)), expected)


def test_rolling_equals_its_definition_with_a_single_first_frame(dit: WanDiT) -> None:
    method = tiny_method("rolling", 2, independent_first_frame=True)
    noise = BlockNoise(CounterNoise(5, LATENT, 2, first_block_frames=1), [0], "cpu")
    expected = Definition(dit, method, some_text(dit)).run(7, noise)
    assert [x.shape[1] for x in expected.values()] == [1, 2, 2, 2, 2, 2, 2]
    assert_same_blocks(run(new_rollout(dit, method, 7, seed=5)), expected)


@pytest.mark.parametrize("first_block", [1, 3])
def test_a_prefix_is_past_like_any_other(dit: WanDiT, first_block: int) -> None:
    """Self Forcing: finished blocks given as a prefix are followed by what followed them."""
    method = tiny_method("self with sink")
    whole = run(new_rollout(dit, method, 6))
    prefix = [whole[block] for block in range(first_block)]
    rest = run(new_rollout(dit, method, 6, prefix=prefix))
    assert sorted(rest) == list(range(first_block, 6))
    for block, latents in rest.items():
        assert torch.equal(latents, whole[block])


def test_rolling_after_a_prefix_sees_it_from_the_first_window(dit: WanDiT) -> None:
    log = LoggingDiT(dit)
    method = tiny_method("rolling")
    prefix = list(torch.randn(2, 1, 2, *LATENT, generator=torch.Generator().manual_seed(0)))
    rest = run(new_rollout(log, method, 5, prefix=prefix))
    assert sorted(rest) == [2, 3, 4]
    assert [call.clean_pass for call in log.calls[:3]] == [True, True, False]
    assert len(log.windows[0].past) == 4
    assert len(log.windows) == 3 + method.levels - 1
    other = [prefix[0] + 0.5, prefix[1]]
    moved = run(new_rollout(dit, method, 5, prefix=other))
    assert all((moved[block] - rest[block]).abs().max() > 1e-3 for block in rest)


class RecordedKeys(NumberedContext):
    """A masked context that remembers every layer's keys and values."""

    def __init__(self, masked: MaskedContext) -> None:
        self.masked = masked
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen[layer] = (k, v)
        return self.masked.of(layer).attend(q, k, v, "auto")


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("block", [1, 3])
def test_clean_passes_equal_one_parallel_forward(
    dit: WanDiT, block: int, independent: bool
) -> None:
    """With all history in view, cached clean passes are the block-causal forward at t = 0."""
    num_blocks = 5
    layout = BlockLayout(block, independent)
    frames = layout.start(num_blocks)
    method = TinyMethod("block", ContextPolicy(0, frames, "original"), layout)
    log = LoggingDiT(dit)
    flows = flows_of(log)
    rollout = new_rollout(log, method, None)
    for _ in range(num_blocks * method.levels + 1):  # one more: the last block's clean pass
        rollout.step()
    assert rollout.cache.finished == frames
    latents = torch.cat([call.latents for call in log.clean_passes], dim=1)
    head_dim = dit.config.head_dim
    mask = frame_mask(frames, block, independent_first_frame=independent)
    context = RecordedKeys(MaskedContext(mask, tuple(range(frames)), GRID, head_dim, CPU))
    parallel = dit(latents, torch.zeros(latents.shape[:2]), rollout.text, context)
    cached = [flow for flow, call in zip(flows, log.calls, strict=True) if call.clean_pass]
    assert_close(torch.cat(cached, dim=1), parallel)
    held = tuple(frame for frame in range(frames) if rollout.cache.holds(frame))
    tokens = torch.arange(frames * 6).unflatten(0, (frames, 6))[list(held)].flatten()
    for layer, (k, v) in context.seen.items():
        keys, values = rollout.cache.layer(layer).read(rollout.cache.slots(held))
        assert_close(keys, k[:, tokens])
        assert_close(values, v[:, tokens])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["rolling", "block"])
@pytest.mark.parametrize("exit_level", [0, 1, 2])
def test_windows_over_a_known_past_are_one_forward(
    dit: WanDiT, name: str, kind: Literal["rolling", "block"], exit_level: int
) -> None:
    """A rollout's clean frames in front, its windows of one exit level behind: the same flows."""
    num_blocks, block = 9, 2
    method = replace(tiny_method(name, block), kind=kind)
    log = LoggingDiT(dit)
    flows = flows_of(log)
    rollout = new_rollout(log, method, num_blocks)
    blocks = run(rollout)
    window_flows = [f for f, call in zip(flows, log.calls, strict=True) if not call.clean_pass]
    plan = RolloutDraw(kind, num_blocks, (exit_level,) * num_blocks)
    schedule = Schedule(kind, method.levels, num_blocks)
    chosen = [window for window in schedule if plan.is_output(schedule.num_levels, window)]
    assert [b for window in chosen for b in window.blocks] == list(range(num_blocks))

    context = ForcedContext(
        method.policy,
        [range(b * block, (b + 1) * block) for b in range(num_blocks)],
        [range(w.blocks[0] * block, (w.blocks[-1] + 1) * block) for w in chosen],
        GRID,
        dit.config.head_dim,
        CPU,
    )
    clean = torch.cat([blocks[b] for b in range(num_blocks)], dim=1)
    noisy = torch.cat([log.windows[window.index].latents for window in chosen], dim=1)
    times = torch.cat([log.windows[window.index].timesteps for window in chosen], dim=1)
    inputs, times = torch.cat([clean, noisy], dim=1), torch.cat([0 * times, times], dim=1)
    together = dit(inputs, times, rollout.text, context)[:, clean.shape[1] :]
    assert_close(together, torch.cat([window_flows[window.index] for window in chosen], dim=1))


def flows_of(log: LoggingDiT) -> list[Tensor]:
    """From now on, every flow the network gives."""
    flows: list[Tensor] = []
    network = log.dit

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(network, name)

        def __call__(self, *arguments: Any) -> Tensor:
            flows.append(network(*arguments))
            return flows[-1]

    log.dit = Recorder()  # type: ignore[assignment]
    return flows


# --- batches, lengths, seeds --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("block", [1, 3])
def test_a_batch_gives_what_each_prompt_gives_alone(dit: WanDiT, name: str, block: int) -> None:
    method = tiny_method(name, block)
    together = run(new_rollout(dit, method, 5, text=some_text(dit, [0, 1])))
    for row in (0, 1):
        alone = run(new_rollout(dit, method, 5, text=some_text(dit, [row])))
        for latents_block, latents in alone.items():
            assert_close(together[latents_block][row : row + 1], latents)
    assert (together[4][0] - together[4][1]).abs().max() > 1e-3


def test_samples_of_one_prompt_differ(dit: WanDiT) -> None:
    method = tiny_method("self")
    rollout = new_rollout(dit, method, 2, text=some_text(dit, [0, 0]))
    noise = BlockNoise(CounterNoise(0, LATENT, 2), [0, 1], "cpu")
    rollout.noise = noise
    rollout.rule = Renoise(torch.tensor(method.timesteps), noise)
    blocks = run(rollout)
    assert (blocks[0][0] - blocks[0][1]).abs().max() > 0.1
    single = run(new_rollout(dit, method, 2))
    assert_close(blocks[1][:1], single[1])


@pytest.mark.parametrize("name", ALL)
def test_a_longer_video_begins_like_a_shorter_one(dit: WanDiT, name: str) -> None:
    """All but the last T-1 blocks (which alone see the end) are the same to the last bit."""
    method = tiny_method(name)
    short, long = (run(new_rollout(dit, method, n)) for n in (6, 9))
    shared = 6 - (method.levels - 1) if method.kind == "rolling" else 6
    for block in range(shared):
        assert torch.equal(short[block], long[block])
    if name == "rolling":
        assert not torch.equal(short[5], long[5])


@pytest.mark.parametrize("name", ALL)
def test_an_unbounded_video_begins_like_a_bounded_one(dit: WanDiT, name: str) -> None:
    method = tiny_method(name)
    bounded = run(new_rollout(dit, method, 9))
    rollout = new_rollout(dit, method, None)
    for block, latents in until(rollout, 6):
        assert torch.equal(latents, bounded[block])


def until(rollout: Rollout, blocks: int) -> Iterator[tuple[int, Tensor]]:
    count = 0
    while count < blocks:
        result = rollout.step()
        assert result is not None
        yield from result.finished.items()
        count += len(result.finished)


# --- stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_resuming_changes_nothing(dit: WanDiT, name: str, steps: int) -> None:
    """To the last bit, from any window, also through a file of plain tensors."""
    method = tiny_method(name)
    straight = new_rollout(dit, method, 7)
    for _ in range(steps):
        straight.step()
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    stopped = straight.index
    expected = run(straight)
    resumed = new_rollout(dit, method, 7)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.index == stopped
    blocks = run(resumed)
    assert blocks.keys() == expected.keys()
    assert all(torch.equal(blocks[block], expected[block]) for block in blocks)


def test_a_state_is_a_copy(dit: WanDiT) -> None:
    method = tiny_method("rolling")
    rollout = new_rollout(dit, method, 7)
    for _ in range(5):
        rollout.step()
    state = rollout.state_dict()
    expected = run(rollout)  # moves cache and blocks in flight on
    for _ in range(2):
        rollout.load_state_dict(state)
        again = run(rollout)
        assert all(torch.equal(again[block], expected[block]) for block in expected)


@pytest.mark.parametrize("sampler", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("name", ["rolling", "self"])
def test_resuming_keeps_the_solvers_history(dit: WanDiT, name: str, sampler: Any) -> None:
    """A multi-step solver remembers earlier flows of a block in flight; so must a state."""
    method = tiny_method(name, levels=4)

    def fresh() -> Rollout:
        return new_rollout(dit, method, 5, rule=OdeStep.with_steps(sampler, 4, 3.0))

    straight = fresh()
    for _ in range(6):
        straight.step()
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    expected = run(straight)
    resumed = fresh()
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    blocks = run(resumed)
    assert blocks.keys() == expected.keys()
    assert all(torch.equal(blocks[block], expected[block]) for block in blocks)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_a_pass_that_fails_behind_the_solver_can_be_tried_again(
    dit: WanDiT, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solvers had moved on, so that the next try took their next step."""
    method = tiny_method("rolling", levels=4)

    def fresh() -> Rollout:
        return new_rollout(dit, method, 7, rule=OdeStep.with_steps(sampler, 4, 3.0))

    expected, ours = run(fresh()), fresh()
    commit, tries, blocks = ours.cache.commit, 0, {}

    def commit_or_fail(latents: Tensor) -> None:
        nonlocal tries
        tries += 1
        if tries % 2:
            raise MemoryError("full")
        commit(latents)

    monkeypatch.setattr(ours.cache, "commit", commit_or_fail)
    while ours.next_window is not None:
        with suppress(MemoryError):
            result = ours.step()
            blocks |= result.finished if result is not None else {}
    assert tries > 4
    assert all(torch.equal(blocks[block], expected[block]) for block in expected)


# --- multi-step sampling ------------------------------------------------------------------------

GUIDANCE = 3.0
STEPS = 5


def full_rollout(dit: WanDiT, rule: OdeStep, frames: int = 4) -> Rollout:
    """All frames of a bidirectional model together, with guidance."""
    layout = BlockLayout(1)
    method = TinyMethod("full", ContextPolicy(0, frames), layout, tuple(rule.timesteps.tolist()))
    text = torch.cat([some_text(dit, [0, 1]), some_text(dit, [7, 7])])
    return new_rollout(dit, method, frames, text=text, rule=rule, rows=2, guidance_scale=GUIDANCE)


def guided(dit: WanDiT, latents: Tensor, timestep: float) -> Tensor:
    """v_uncond + g (v_cond - v_uncond) by two separate bidirectional forward passes."""
    t = torch.full(latents.shape[:2], timestep)
    cond = dit(latents, t, dit.encode_text(some_text(dit, [0, 1])))
    uncond = dit(latents, t, dit.encode_text(some_text(dit, [7, 7])))
    return uncond + GUIDANCE * (cond - uncond)


def initial_noise(frames: int = 4) -> Tensor:
    source = CounterNoise(0, LATENT, 1)
    video = torch.cat([source(0, frame, 0) for frame in range(frames)])
    return video.expand(2, -1, -1, -1, -1)


@pytest.mark.parametrize("sampler", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_steps_are_even_before_the_shift(sampler: Any, shift: float) -> None:
    """Diffusers' own spacing for Euler shifts its end twice, and its last step is a tiny one."""
    timesteps = OdeStep.with_steps(sampler, STEPS, shift).timesteps
    sigma = 1 - torch.arange(STEPS) / STEPS
    expected = 1000 * shift * sigma / (1 + (shift - 1) * sigma)
    assert_close(timesteps, expected, atol=1.5)  # the multi-step ones round down


def test_euler_equals_a_loop_written_out(dit: WanDiT) -> None:
    timesteps = torch.tensor([1000.0, 900.0, 700.0, 400.0, 150.0])
    blocks = run(full_rollout(dit, OdeStep.at(timesteps)))
    x = initial_noise()
    for t, following in zip(timesteps, [*timesteps[1:], torch.tensor(0.0)], strict=True):
        x = euler_step(x, guided(dit, x, t.item()), t, following)
    assert_close(torch.cat([blocks[frame] for frame in range(4)], dim=1), x, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("unipc", diffusers.UniPCMultistepScheduler),
        ("dpm++", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_solvers_equal_diffusers_by_hand(dit: WanDiT, sampler: Any, scheduler: Any) -> None:
    """All frames in one solver, where the engine has one per block."""
    blocks = run(full_rollout(dit, OdeStep.with_steps(sampler, STEPS, 5.0)))
    solver = scheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0,
    )
    solver.set_timesteps(STEPS)
    x = initial_noise()
    for t in solver.timesteps:
        x = solver.step(guided(dit, x, float(t)), t, x).prev_sample
    assert_close(torch.cat([blocks[frame] for frame in range(4)], dim=1), x, atol=1e-4)


def test_full_schedule_equals_a_single_block(dit: WanDiT) -> None:
    """Guards against positions or levels that depend on how frames fall into blocks."""
    timesteps = torch.tensor([1000.0, 700.0, 300.0])
    by_frame = run(full_rollout(dit, OdeStep.at(timesteps)))
    method = TinyMethod("full", ContextPolicy(0, 4), BlockLayout(4), tuple(timesteps.tolist()))
    rule = OdeStep.at(timesteps)
    text = torch.cat([some_text(dit, [0, 1]), some_text(dit, [7, 7])])
    whole = new_rollout(
        dit,
        method,
        1,
        text=text,
        rule=rule,
        rows=2,
        guidance_scale=GUIDANCE,
        source=lambda sample, block, level: initial_noise()[0],
    )
    assert_close(torch.cat([by_frame[frame] for frame in range(4)], dim=1), run(whole)[0])


def test_causal_multi_step_equals_a_loop_written_out(dit: WanDiT) -> None:
    """Block by block, each block's ODE to its end, then its clean pass as context."""
    timesteps = torch.tensor([1000.0, 800.0, 500.0, 200.0])
    method = TinyMethod("block", ContextPolicy(0, 6, "original"), BlockLayout(2), (0.0,) * 4)
    blocks = run(new_rollout(dit, method, 3, rule=OdeStep.at(timesteps)))
    text = dit.encode_text(some_text(dit))
    source = CounterNoise(0, LATENT, 2)
    clean = torch.zeros(1, 0, *LATENT)
    for block in range(3):
        x = source(0, block, 0)[None]
        frames = clean.shape[1] + 2
        mask = frame_mask(frames, 2)
        context = MaskedContext(mask, tuple(range(frames)), GRID, dit.config.head_dim, CPU)
        for t, following in zip(timesteps, [*timesteps[1:], torch.tensor(0.0)], strict=True):
            levels = torch.cat([torch.zeros(1, frames - 2), t.expand(1, 2)], dim=1)
            flow = dit(torch.cat([clean, x], dim=1), levels, text, context)[:, -2:]
            x = euler_step(x, flow, t, following)
        assert_close(blocks[block], x, atol=1e-4)
        clean = torch.cat([clean, x], dim=1)


def test_rolling_multi_step_keeps_each_blocks_history(dit: WanDiT) -> None:
    """Blocks of one window are at different levels: each needs a solver of its own."""
    method = tiny_method("rolling", levels=STEPS)
    log = LoggingDiT(dit)
    rule = OdeStep.with_steps("unipc", STEPS, 5.0)
    flows = flows_of(log)
    blocks = run(new_rollout(log, method, 3, rule=rule))
    window_flows = [f for f, call in zip(flows, log.calls, strict=True) if not call.clean_pass]
    for block in range(3):
        solver = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        solver.set_timesteps(STEPS)
        x = CounterNoise(0, LATENT, 2)(0, block, 0)[None]
        for level, t in enumerate(solver.timesteps):
            window = block + level
            offset = 2 * (block - max(0, window - STEPS + 1))
            flow = window_flows[window][:, offset : offset + 2]
            x = solver.step(flow, t, x).prev_sample
        assert torch.equal(blocks[block], x)


# --- no end -------------------------------------------------------------------------------------


class FixedNoise:
    """Noise that does not tell blocks apart, so that equal states have equal futures."""

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(level))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rolling", "infinite", "averaged"])
def test_late_windows_are_the_same_computation_as_early_ones(name: str) -> None:
    """Beyond latent frame 1,100: given what an early window had, a late one does the same.

    Guards against positions that grow with the video (a table of 1,024 rows ends at 256 s), and
    against anything else that depends on how long the stream has been running.
    """
    tiny = random_dit(dim=12, ffn_dim=12, num_heads=1, num_layers=1, in_dim=4, out_dim=4)
    method = tiny_method(name, 3)

    def fresh() -> Rollout:
        return new_rollout(tiny, method, None, source=FixedNoise(), latent=(4, 2, 2), grid=(1, 1))

    period = method.policy.recent_capacity(3)  # after which a frame has the same slot again
    period *= 1 if name == "rolling" else 3
    early = fresh()
    while early.cache.finished < 60:
        early.step()
    state = early.state_dict()
    late = fresh()
    while (frame := late.cache.finished) <= 1100 or (frame - state["cache"]["finished"]) % period:
        late.step()
    ahead = late.cache.finished - early.cache.finished
    assert late.index == early.index + ahead // 3 * early.plan.period
    state["cache"]["finished"] += ahead
    for part in ("in_flight", "unwritten"):
        state[part] = {block + ahead // 3: x for block, x in state[part].items()}
    state["index"] = late.index
    late.load_state_dict(state)
    for _ in range(3 * method.levels):
        ours, theirs = late.step(), early.step()
        assert torch.equal(ours.x0, theirs.x0)
        assert list(ours.finished) == [block + ahead // 3 for block in theirs.finished]
    assert late.cache.finished > 1100


def test_a_stream_holds_no_more_the_longer_it_runs() -> None:
    tiny = random_dit(dim=12, ffn_dim=12, num_heads=1, num_layers=1, in_dim=4, out_dim=4)
    rollout = new_rollout(
        tiny, tiny_method("rolling", 3), None, source=FixedNoise(), latent=(4, 2, 2), grid=(1, 1)
    )
    sizes = set()
    for index in range(60):
        rollout.step()
        state = rollout.state_dict()
        if index > 10:
            sizes.add((len(state["in_flight"]), len(state["unwritten"]), rollout.cache.num_bytes))
    assert len(sizes) == 1
    assert isinstance(rollout.cache, KVCache)
