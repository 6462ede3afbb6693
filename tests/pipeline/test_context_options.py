"""Causal windows and averaged sinks: against their definition, over all that was ever computed."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.rollout import Rollout
from pipeline.schedule import Window
from tests.tiny_pipeline import random_dit
from tests.tiny_rollout import (
    GRID,
    LATENT,
    NumberedContext,
    TinyMethod,
    new_rollout,
    run,
    some_text,
    tiny_method,
)
from utils.config import load_config
from utils.errors import UserError
from wan.context import AttentionContext, CachedContext
from wan.dit import WanDiT
from wan.kv_cache import Added, KVCache, LayerStore
from wan.rope import apply_rope, rotation

CPU = torch.device("cpu")
TOKENS = GRID[0] * GRID[1]
WEIGHT = 0.7
CAUSAL: dict[str, Any] = {"window_attention": "block_causal"}
AVERAGED: dict[str, Any] = {"sink_ema": WEIGHT}


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    return random_dit(num_layers=2).double()


def method_of(name: str, **options: Any) -> TinyMethod:
    """A method with options of its policy."""
    method = tiny_method(name, independent_first_frame=options.pop("independent", False))
    return replace(method, policy=replace(method.policy, **options))


class Definition(NumberedContext):
    """Attention of one pass under an explicit mask; the past are all frames, never evicted."""

    def __init__(self, memory: "Memory", context: CachedContext, window: Window | None) -> None:
        self.memory = memory
        self.clean_pass = window is None
        self.queries = len(context.view.positions) - len(context.view.frames)
        layout = memory.rollout.layout
        blocks = [] if window is None else list(window.blocks)
        self.spans = [layout.frames(block) for block in blocks] or [self.queries]
        self.finished = context.cache.finished

    def past(self, frames: dict[int, Tensor]) -> tuple[list[Tensor], list[int]]:
        """What is seen of the past, frame by frame, and where each of its frames lies."""
        policy, finished = self.memory.rollout.plan.policy, self.finished
        if self.clean_pass and not policy.clean_pass_sees_sink:
            recent = list(range(finished))[-(policy.max_frames - self.queries) :]
            return [frames[f] for f in recent], recent
        size = policy.sink_frames
        room = policy.max_frames - size - self.queries
        oldest = max(size, finished - room)
        sink = [frames[f] for f in range(min(size, finished))]
        for frame in range(size, oldest) if policy.sink_ema is not None else ():
            old, share = sink[frame % size], 1 - policy.sink_ema
            sink[frame % size] = old + share * (frames[frame] - old)
        recent = list(range(oldest, finished))
        return sink + [frames[f] for f in recent], [*range(len(sink)), *recent]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory, policy = self.memory, self.memory.rollout.plan.policy
        past, places = self.past(memory.keys[layer])
        keys = torch.cat([*past, k], dim=1)
        values = torch.cat([*self.past(memory.values[layer])[0], v], dim=1)
        places += range(self.finished, self.finished + self.queries)
        if policy.sink_position == "contiguous":
            places = list(range(len(places)))
        turn = rotation(tuple(p - places[0] for p in places), GRID, q.shape[-1], CPU)
        scores = torch.einsum(
            "bqhd,bkhd->bhqk", apply_rope(q, turn[-q.shape[1] :]), apply_rope(keys, turn)
        )
        mask = self.mask(len(past), causal=policy.window_attention == "block_causal")
        weights = (scores / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        if self.clean_pass:
            for place in range(self.queries):
                tokens = slice(place * TOKENS, (place + 1) * TOKENS)
                memory.keys[layer][self.finished + place] = k[:, tokens].detach()
                memory.values[layer][self.finished + place] = v[:, tokens].detach()
        return torch.einsum("bhqk,bkhd->bqhd", weights, values)

    def mask(self, past: int, *, causal: bool) -> Tensor:
        """Which token (row) sees which key: `[queries, keys]`."""
        block_of = torch.arange(len(self.spans)).repeat_interleave(torch.tensor(self.spans))
        own = block_of[:, None] >= block_of[None] if causal else torch.ones(len(block_of), 1) > 0
        own = own.expand(len(block_of), len(block_of))
        frames = torch.cat([torch.ones(len(block_of), past, dtype=torch.bool), own], dim=1)
        return frames.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)


class Memory:
    """Keys and values of every finished frame of a rollout, by layer, which it attends to."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        layers = range(rollout.dit.config.num_layers)
        self.keys: list[dict[int, Tensor]] = [{} for _ in layers]
        self.values: list[dict[int, Tensor]] = [{} for _ in layers]
        rollout.wrap_context = self.context

    def context(self, context: CachedContext, window: Window | None) -> AttentionContext:
        return Definition(self, context, window)


PREFIX = [torch.randn(1, 2, *LATENT, generator=torch.Generator().manual_seed(b)) for b in range(4)]
CASES: dict[str, tuple[str, dict[str, Any], Sequence[Tensor]]] = {
    "rolling, causal": ("rolling", CAUSAL, ()),
    "rolling, averaged": ("rolling", AVERAGED, ()),
    "rolling, both, after a prefix": ("rolling", CAUSAL | AVERAGED, PREFIX),
    "rolling, both, first frame alone": ("rolling", CAUSAL | AVERAGED | {"independent": True}, ()),
    "rolling, both, a sink of three at its distance": (
        "rolling",
        CAUSAL | AVERAGED | {"sink_frames": 3, "max_frames": 12, "sink_position": "original"},
        (),
    ),
    "rolling, averaged, nothing recent": ("rolling", AVERAGED | {"max_frames": 8}, ()),
    "block, averaged at its distance": ("self with sink", AVERAGED, ()),
    "block, averaged": ("infinite", AVERAGED | CAUSAL, ()),
    "block, averaged, nothing recent": ("infinite", AVERAGED | {"max_frames": 3}, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_rollouts_equal_their_definition(dit: WanDiT, case: str) -> None:
    """Under an explicit mask and with every frame kept, whatever is merged, evicted or kept."""
    name, options, prefix = CASES[case]
    method, blocks = method_of(name, **options), 11
    defined = new_rollout(dit, method, blocks, prefix=prefix)
    Memory(defined)
    expected = run(defined)
    for given in ({}, {"merged": True}, {"recent": 2 * blocks}, {"recent": 10, "merged": True}):
        found = run(new_rollout(dit, method, blocks, prefix=prefix, **given))
        assert found.keys() == expected.keys()
        for block, latents in found.items():
            torch.testing.assert_close(latents, expected[block], atol=1e-6, rtol=0)
    plain = run(new_rollout(dit, tiny_method(name), blocks, prefix=prefix))
    assert method.layout.independent_first_frame or not torch.equal(plain[10], found[10])


@pytest.mark.parametrize("name", ["rolling", "self with sink", "infinite"])
def test_a_window_of_one_block_is_causal_anyway(dit: WanDiT, name: str) -> None:
    plain, causal = (replace(method_of(name, **options), kind="block") for options in ({}, CAUSAL))
    ours, theirs = (run(new_rollout(dit, method, 7)) for method in (causal, plain))
    assert all(torch.equal(ours[block], theirs[block]) for block in theirs)


def test_a_sink_that_takes_nothing_in_is_one_that_stays(dit: WanDiT) -> None:
    plain = run(new_rollout(dit, tiny_method("infinite"), 9))
    kept = run(new_rollout(dit, method_of("infinite", sink_ema=1.0), 9))
    assert all(torch.equal(kept[block], plain[block]) for block in plain)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float8"])
def test_an_average_is_as_fine_as_float32_in_any_cache(kept: str) -> None:
    """A weight of 0.999 added less to a key in bfloat16 than its last bit."""
    dtype = torch.float32 if kept == "float32" else torch.bfloat16
    cache = KVCache(
        **{"num_layers": 1, "num_heads": 2, "head_dim": 4, "tokens_per_frame": 3},
        **{"latent": (1, 1, 1), "sink_frames": 2, "recent_frames": 6, "batch": 1},
        **{"dtype": dtype, "device": "cpu", "in_float8": kept == "float8"},
        **{"sink_ema": 0.999, "sink_lag": 4},
    )
    bytes_before = cache.num_bytes
    for frame in range(0, 300, 2):
        k = torch.full((1, 6, 2, 4), 1.0 if frame < 2 else 1.125, dtype=dtype)
        cache.layer(0).write(cache.next_slots(2), k, 2 * k)
        cache.commit(torch.zeros(1, 2, 1, 1, 1))
    sink = 1.125 - 0.125 * 0.999 ** ((300 - 2) // 2)
    keys, values = cache.layer(0).averaged(cache.added(298))
    assert keys.dtype == torch.float32
    torch.testing.assert_close(keys, torch.full_like(keys, sink), atol=1e-5, rtol=0)
    torch.testing.assert_close(values, 2 * keys)
    assert cache.num_bytes == bytes_before


def test_an_average_that_fails_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block counted as finished, so that the next try put it behind itself."""

    def averages(fails: int | None) -> Tensor:
        cache = KVCache(
            **{"num_layers": 1, "num_heads": 1, "head_dim": 2, "tokens_per_frame": 1},
            **{"latent": (1, 1, 1), "sink_frames": 1, "recent_frames": 4, "batch": 1},
            **{"dtype": torch.float32, "device": "cpu", "sink_ema": 0.5, "sink_lag": 2},
        )
        average, tries = LayerStore.averaged, 0

        def averaged(self: LayerStore, added: Added) -> tuple[Tensor, Tensor]:
            nonlocal tries
            tries += 1
            if tries == fails:
                raise torch.OutOfMemoryError("full")
            return average(self, added)

        monkeypatch.setattr(LayerStore, "averaged", averaged)
        while cache.finished < 9:
            k = torch.full((1, 1, 1, 2), float(cache.finished))
            with suppress(torch.OutOfMemoryError):
                cache.layer(0).write(cache.next_slots(1), k, k)
                cache.commit(torch.zeros(1, 1, 1, 1, 1))
        monkeypatch.setattr(LayerStore, "averaged", average)
        return torch.cat([*cache.layer(0).sink, *cache.layer(0)[:2]], dim=1)

    assert all(torch.equal(averages(fails), averages(None)) for fails in range(1, 8))


def test_after_a_recache_the_average_begins_again(dit: WanDiT) -> None:
    """With the first frames under the new text; the other rows of a batch keep what they have."""
    method = method_of("infinite", **AVERAGED)
    rollout = new_rollout(dit, method, None, text=some_text(dit, [0, 1]))
    while rollout.cache.finished < 20:
        rollout.step()
    store, pinned = rollout.cache.layer(1), torch.tensor([0])
    before = store.sink[0].clone()
    assert not torch.allclose(before, store.keys[:, :1])
    rollout.text = dit.encode_text(some_text(dit, [0, 7]))
    rollout.recache([1])
    assert torch.equal(store.sink[0][:1], before[:1])
    assert torch.equal(store.sink[0][1], store.keys[1, pinned])
    state = rollout.state_dict(latents_only=True)
    branch = new_rollout(dit, method, None, text=some_text(dit, [0, 7]))
    branch.load_state_dict(state)
    rollout.recache()
    for _ in range(9):
        ours, theirs = branch.step(), rollout.step()
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.x0, theirs.x0)


def test_a_new_scene_has_a_new_average(dit: WanDiT) -> None:
    method = method_of("rolling", **AVERAGED)
    rollout, other = (new_rollout(dit, method, None, seed=seed) for seed in (1, 2))
    while other.cache.finished < 12:
        other.step()
    other.restart(scene=True)
    other.noise = rollout.noise
    other.rule = rollout.rule
    shift = other.next_block
    assert shift is not None
    sinks = []
    for one in (rollout, other):
        one.noise.sources[:] = [(0, lambda *_: torch.ones(2, *LATENT))]
        for _ in range(12):
            one.step()
        sinks.append(one.cache.layer(0).sink[0].clone())
    assert torch.equal(*sinks)


def test_options_that_have_nothing_to_act_on_are_refused() -> None:
    """One sentence, before any weights are read."""
    for changes, sentence in (
        (["sink_ema=0.9", "model_kwargs.sink_size=0"], "set model_kwargs.sink_size to at least 1"),
        (["window_attention=block_causal", "schedule=full"], "are for a network that looks back"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_config("configs/rolling_forcing_dmd.yaml", changes)
