"""Context policies against recorded views, the cache's contract, and recorded rolling passes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.golden_cases import Case, case_names, load_case, load_json, load_weights
from tests.tiny_pipeline import golden_pipeline
from wan.context import CachedContext
from wan.dit import DiTConfig, WanDiT
from wan.float8 import from_bytes, to_bytes
from wan.kv_cache import ContextPolicy, KVCache, View
from wan.rope import apply_rope, rotation

TOLERANCE = 1e-4
CPU = torch.device("cpu")
BLOCKWISE = [*case_names("self_forcing_inference"), *case_names("infinite_forcing_inference")]
ROLLING = case_names("causal_dit_rolling")


# --- what passes see ----------------------------------------------------------------------------


class RecordedView(NamedTuple):
    """One recorded call: its own frames, the past frames it saw, all keys' positions."""

    call: str
    queries: tuple[int, ...]
    past: tuple[int, ...]
    positions: tuple[int, ...]
    query_positions: tuple[int, ...]

    @property
    def clean_pass(self) -> bool:
        return self.call.startswith("update") or self.call.endswith("context")


def inclusive(bounds: list[int]) -> tuple[int, ...]:
    return tuple(range(bounds[0], bounds[1] + 1))


def recorded_views(meta: dict[str, Any]) -> Iterator[RecordedView]:
    for entry in meta["attention_trace"]:
        *past, own = entry["keys"]
        queries = inclusive(entry["query_frames"])
        assert own["from_call"] == entry["call"]
        assert inclusive(own["frames"]) == queries
        yield RecordedView(
            entry["call"],
            queries,
            tuple(frame for part in past for frame in inclusive(part["frames"])),
            tuple(p for part in entry["keys"] for p in inclusive(part["rope_positions"])),
            inclusive(entry["query_rope_positions"]),
        )


def block_of(meta: dict[str, Any]) -> int:
    """Frames of a block: those of the first clean pass."""
    return next(len(view.queries) for view in recorded_views(meta) if view.clean_pass)


def recorded_policy(meta: dict[str, Any]) -> ContextPolicy:
    if meta["reference"].startswith("RollingForcing/"):
        # The file does not name the sizes: the sink is what the first windows with a past see.
        later = [view for view in recorded_views(meta) if view.past and not view.clean_pass]
        longest = max(len(view.positions) for view in recorded_views(meta))
        return ContextPolicy(len(later[0].past), longest, "contiguous", clean_pass_sees_sink=False)
    position = "contiguous" if meta["reference"].startswith("Infinite-Forcing/") else "original"
    return ContextPolicy(meta["sink_size"], meta["max_attention_frames"], position)


@pytest.mark.golden
@pytest.mark.parametrize("name", [*ROLLING, *BLOCKWISE])
def test_views_are_the_recorded_ones(name: str) -> None:
    """Every recorded call: which frames it saw, and at which positions up to a common shift."""
    meta = load_json(name)
    policy = recorded_policy(meta)
    kinds = set()
    for recorded in recorded_views(meta):
        view = policy.view(
            recorded.queries[0], len(recorded.queries), clean_pass=recorded.clean_pass
        )
        shift = recorded.positions[0]
        assert view.frames == recorded.past, recorded.call
        assert view.positions == tuple(p - shift for p in recorded.positions), recorded.call
        assert recorded.query_positions == recorded.positions[len(recorded.past) :]
        kinds.add(recorded.clean_pass)
    assert kinds == {False, True}


PUBLISHED_ROLLING = ContextPolicy(3, 21, "contiguous", clean_pass_sees_sink=False)


@pytest.mark.parametrize(
    ("finished", "queries", "frames"),
    [
        (0, 15, []),
        (3, 15, [range(3)]),
        (6, 15, [range(6)]),
        (300, 15, [range(3), range(297, 300)]),
        (300, 12, [range(3), range(294, 300)]),
        (300, 9, [range(3), range(291, 300)]),
        (300, 6, [range(3), range(288, 300)]),
        (300, 3, [range(3), range(285, 300)]),
    ],
)
def test_rolling_windows_see_sink_and_newest(
    finished: int, queries: int, frames: list[range]
) -> None:
    view = PUBLISHED_ROLLING.view(finished, queries)
    assert view.frames == tuple(frame for part in frames for frame in part)
    assert view.positions == tuple(range(len(view.frames) + queries))


@pytest.mark.parametrize(("finished", "oldest"), [(0, 0), (3, 0), (18, 0), (21, 3), (300, 282)])
def test_rolling_clean_pass_sees_the_newest_without_a_sink(finished: int, oldest: int) -> None:
    view = PUBLISHED_ROLLING.view(finished, 3, clean_pass=True)
    assert view == View(tuple(range(oldest, finished)), tuple(range(finished - oldest + 3)))


def test_original_sink_stays_at_its_true_distance() -> None:
    view = ContextPolicy(2, 8, "original").view(100, 3)
    assert view == View((0, 1, 97, 98, 99), (0, 1, 97, 98, 99, 100, 101, 102))


def test_contiguous_sink_is_right_before_the_recent_frames() -> None:
    view = ContextPolicy(2, 8, "contiguous").view(100, 3)
    assert view == View((0, 1, 97, 98, 99), tuple(range(8)))


@pytest.mark.parametrize("policy", [PUBLISHED_ROLLING, ContextPolicy(1, 7), ContextPolicy(0, 6)])
@pytest.mark.parametrize("clean_pass", [False, True])
def test_steady_state_never_changes_shape(policy: ContextPolicy, clean_pass: bool) -> None:
    """Length is unlimited: positions stay where they are, however late the pass."""
    early = policy.view(60, 3, clean_pass=clean_pass)
    late = policy.view(3 * 10**6, 3, clean_pass=clean_pass)
    assert early.positions == late.positions
    assert len(late.positions) == policy.max_frames


@pytest.mark.parametrize(
    ("policy", "first", "expected"),
    [
        (ContextPolicy(0, 6), 0, True),
        (ContextPolicy(0, 3), 0, False),
        (ContextPolicy(3, 6), 0, True),
        (ContextPolicy(3, 6), 3, False),
        (PUBLISHED_ROLLING, 300, True),
    ],
)
def test_policy_knows_what_nobody_reads(policy: ContextPolicy, first: int, expected: bool) -> None:
    assert policy.reads(first, 3) is expected
    seen_later = any(
        first in policy.view(finished, 3, clean_pass=clean_pass).frames
        for finished in range(first + 3, first + 12, 3)
        for clean_pass in (False, True)
    )
    assert seen_later is expected


# --- the cache's contract -----------------------------------------------------------------------

TOKENS, HEADS, WIDTH, LAYERS = 2, 3, 4, 2


def new_cache(sink: int = 2, recent: int = 4, **sizes: Any) -> KVCache:
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "head_dim": WIDTH,
        "tokens_per_frame": TOKENS,
        "latent": (1, 2, 2),
        "sink_frames": sink,
        "recent_frames": recent,
        "batch": 2,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return KVCache(**settings | sizes)


def marked(frames: range, layer: int, what: float = 0.0) -> Tensor:
    """Keys whose every number tells frame, layer and kind."""
    values = torch.tensor([frame + layer / 10 + what for frame in frames])
    return values.repeat_interleave(TOKENS)[None, :, None, None].expand(2, -1, HEADS, WIDTH)


def finish(cache: KVCache, count: int) -> None:
    frames = range(cache.finished, cache.finished + count)
    slots = cache.next_slots(count)
    for layer in range(LAYERS):
        cache.layer(layer).write(slots, marked(frames, layer), marked(frames, layer, 0.5))
    latents = torch.tensor([float(frame) for frame in frames])
    cache.commit(latents[None, :, None, None, None].expand(2, -1, 1, 2, 2))


def held(cache: KVCache) -> list[int]:
    return [frame for frame in range(cache.finished + 5) if cache.holds(frame)]


def test_holds_the_sink_and_the_newest() -> None:
    cache = new_cache(sink=2, recent=4)
    assert held(cache) == []
    finish(cache, 3)
    assert held(cache) == [0, 1, 2]
    for _ in range(4):
        finish(cache, 3)
    assert cache.finished == 15
    assert held(cache) == [0, 1, 11, 12, 13, 14]
    assert not cache.holds(-1)


@pytest.mark.parametrize(("sink", "recent", "block"), [(2, 4, 3), (3, 3, 3), (0, 5, 2), (1, 6, 1)])
def test_reads_what_was_written(sink: int, recent: int, block: int) -> None:
    """Every frame it holds, in any order, on every layer; the ring wraps several times."""
    cache = new_cache(sink, recent)
    while cache.finished < 4 * (sink + recent):
        finish(cache, block)
        frames = held(cache)[::-1]
        slots = cache.slots(tuple(frames))
        assert len(frames) == min(cache.finished, sink + recent)
        assert len(set(slots.tolist())) == len(frames)
        for layer in range(LAYERS):
            keys, values = cache.layer(layer).read(slots)
            expected = torch.cat([marked(range(f, f + 1), layer) for f in frames], dim=1)
            assert torch.equal(keys, expected)
            assert torch.equal(values, expected + 0.5)
        assert cache.latents(tuple(frames))[0, :, 0, 0, 0].tolist() == frames


def test_evicted_and_future_frames_are_errors() -> None:
    cache = new_cache(sink=2, recent=4)
    finish(cache, 3)
    with pytest.raises(KeyError, match=r"frames \[3\] are not in the cache \(3 finished\)"):
        cache.slots((2, 3))
    finish(cache, 4)
    with pytest.raises(KeyError, match=r"\[2\]"):
        cache.slots((0, 1, 2, 3))


def test_more_frames_than_the_ring_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 frames at once do not fit a ring of 4"):
        new_cache(recent=4).next_slots(5)


def test_read_gives_copies() -> None:
    """A pass may be recomputed after its cache moved on, if what it read was its own."""
    cache = new_cache()
    finish(cache, 3)
    slots = cache.slots((0, 1, 2))
    keys, values = cache.layer(0).read(slots)
    keys.fill_(-1)
    values.fill_(-1)
    assert torch.equal(cache.layer(0).read(slots)[0], marked(range(3), 0))
    assert torch.equal(cache.layer(0).read(slots)[1], marked(range(3), 0, 0.5))


def test_writing_finishes_nothing_until_commit() -> None:
    cache = new_cache()
    finish(cache, 2)
    cache.layer(0).write(cache.next_slots(2), marked(range(2, 4), 0), marked(range(2, 4), 0))
    assert cache.finished == 2
    assert held(cache) == [0, 1]
    assert torch.equal(cache.layer(0).read(cache.slots((0, 1)))[0], marked(range(2), 0))
    cache.commit(torch.zeros(2, 2, 1, 2, 2))
    assert held(cache) == [0, 1, 2, 3]


def test_no_gradient_goes_in() -> None:
    """An in-place write that autograd sees leaks gradient through stale entries."""
    cache = new_cache()
    k = marked(range(2), 0).clone().requires_grad_(True)
    cache.layer(0).write(cache.next_slots(2), k * 2, k * 3)
    cache.commit(torch.ones(2, 2, 1, 2, 2, requires_grad=True) * 2)
    keys, values = cache.layer(0).read(cache.slots((0, 1)))
    assert not keys.requires_grad
    assert not values.requires_grad
    assert not cache.latents((0, 1)).requires_grad


def test_state_goes_round() -> None:
    cache = new_cache()
    for _ in range(3):
        finish(cache, 3)
    state = cache.state_dict()
    finish(cache, 3)  # the state may not notice
    other = new_cache()
    other.load_state_dict(state)
    finish(cache, 3)  # neither may the other cache
    assert other.finished == state["finished"] == 9
    frames = tuple(held(other))
    assert frames == (0, 1, 5, 6, 7, 8)
    expected = torch.cat([marked(range(f, f + 1), 1) for f in frames], dim=1)
    assert torch.equal(other.layer(1).read(other.slots(frames))[0], expected)
    assert torch.equal(other.layer(1).read(other.slots(frames))[1], expected + 0.5)
    assert other.latents(frames)[1, :, 0, 1, 1].tolist() == list(frames)


def test_state_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="state is of a cache of"):
        new_cache(recent=6).load_state_dict(new_cache().state_dict())


def test_memory_is_what_the_sizes_say() -> None:
    cache = new_cache(sink=2, recent=4, dtype=torch.bfloat16)
    keys_and_values = 2 * LAYERS * 2 * 6 * TOKENS * HEADS * WIDTH * 2
    latents = 2 * 6 * 4 * 4  # float32
    assert cache.num_bytes == keys_and_values + latents


def test_in_float8_the_same_is_kept_in_half_the_memory() -> None:
    """What is read is rounded; states go round as they are, rows come back as they were."""
    cache, plain = (new_cache(dtype=torch.bfloat16, in_float8=own) for own in (True, False))
    latents = 2 * 6 * 4 * 4
    assert cache.num_bytes - latents == (plain.num_bytes - latents) / 2
    for _ in range(3):
        finish(cache, 3)
    kept = cache.rows([1])
    other = new_cache(dtype=torch.bfloat16, in_float8=True)
    other.load_state_dict(cache.state_dict())
    other.put_rows([1], kept)
    frames = tuple(held(other))
    marks = torch.cat([marked(range(f, f + 1), 1) for f in frames], dim=1)
    read = other.layer(1).read(other.slots(frames), torch.bfloat16)
    for found, exact in zip(read, (marks, marks + 0.5), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, from_bytes(to_bytes(exact), torch.bfloat16))
    with pytest.raises(ValueError, match="another kv_cache_dtype"):
        plain.load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="another kv_cache_dtype"):
        cache.load_state_dict(plain.state_dict())


# --- recorded passes ----------------------------------------------------------------------------


class Replay:
    """Feeds recorded inputs through the network under a policy, one pass after the other."""

    def __init__(self, case: Case, policy: ContextPolicy, recent_frames: int) -> None:
        self.dit = WanDiT(DiTConfig.from_dict(case.meta["dit"]))
        self.dit.load_state_dict(load_weights(case.meta["weights"]))
        self.dit.requires_grad_(False)
        config = self.dit.config
        self.policy = policy
        self.text = self.dit.encode_text(case.tensors["prompt_embeds"])
        rows, columns = case.meta["latent_hw"]
        self.grid = (rows // config.patch_size[1], columns // config.patch_size[2])
        self.cache = KVCache(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            tokens_per_frame=case.meta["tokens_per_frame"],
            latent=(config.in_dim, rows, columns),
            sink_frames=policy.sink_frames,
            recent_frames=recent_frames,
            batch=len(case.tensors["prompt_embeds"]),
            dtype=torch.float32,
            device=CPU,
        )

    def window(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        return self._pass(latents, timesteps, clean_pass=False)

    def clean_pass(self, latents: Tensor, *, keep: bool) -> Tensor:
        """The flow of a clean pass; with `keep` its keys and values enter the cache."""
        before = self.cache.state_dict()
        flow = self._pass(latents, torch.zeros(latents.shape[:2]), clean_pass=True)
        if keep:
            self.cache.commit(latents)
        else:
            self.cache.load_state_dict(before)
        return flow

    def _pass(self, latents: Tensor, timesteps: Tensor, *, clean_pass: bool) -> Tensor:
        view = self.policy.view(self.cache.finished, latents.shape[1], clean_pass=clean_pass)
        context = CachedContext(
            self.cache, view, self.grid, self.dit.config.head_dim, write=clean_pass
        )
        return self.dit(latents, timesteps, self.text, context)


@pytest.mark.golden
@pytest.mark.parametrize("name", ROLLING)
def test_rolling_passes_give_the_recorded_flows(name: str) -> None:
    """All window and clean passes of a rolling rollout, and the first layer's cache.

    The recording runs a clean pass after every window, also while block 0 is not finished; only
    the last one of a block stays in the cache, so the others are computed and undone here.
    """
    case = load_case(name)
    frames, windows = case.meta["frames"], case.meta["windows"]
    policy = recorded_policy(case.meta)
    replay = Replay(case, policy, recent_frames=frames - policy.sink_frames)
    starts = [window["start_frame"] for window in windows] + [frames]
    passes = 0
    for i, window in enumerate(windows):
        recorded = window_tensors(case, window["window"])
        assert replay.cache.finished == window["start_frame"]
        flow = replay.window(recorded["input"], recorded["timestep"])
        assert_close(flow, recorded["flow"], f"window {i}")
        last_of_block = starts[i + 1] > starts[i]
        update_flow = replay.clean_pass(recorded["update_input"], keep=last_of_block)
        assert_close(update_flow, recorded["update_flow"], f"clean pass {i}")
        if "layer0_cache_k" in recorded:
            compare_caches(case, replay.cache, recorded, window)
        passes += 1
    assert passes == len(windows) > 1
    assert replay.cache.finished == frames


@pytest.mark.golden
@pytest.mark.parametrize("name", ROLLING)
def test_rolling_passes_fit_the_smallest_cache(name: str) -> None:
    """A ring of what the policy reads gives the same flows as one that keeps everything."""
    case = load_case(name)
    policy = recorded_policy(case.meta)
    replay = Replay(case, policy, policy.recent_capacity(block_of(case.meta)))
    starts = [window["start_frame"] for window in case.meta["windows"]] + [case.meta["frames"]]
    for i, window in enumerate(case.meta["windows"]):
        recorded = window_tensors(case, window["window"])
        if starts[i + 1] > starts[i]:
            flow = replay.window(recorded["input"], recorded["timestep"])
            assert_close(flow, recorded["flow"], f"window {i}")
            update_flow = replay.clean_pass(recorded["update_input"], keep=True)
            assert_close(update_flow, recorded["update_flow"], f"clean pass {i}")


def window_tensors(case: Case, window: int) -> dict[str, Tensor]:
    pattern = re.compile(rf"window0*{window}\.(.+)")
    found = {m[1]: x for name, x in case.tensors.items() if (m := pattern.fullmatch(name))}
    assert {"input", "timestep", "flow", "update_input", "update_flow"} <= found.keys()
    return found


def compare_caches(
    case: Case, cache: KVCache, recorded: dict[str, Tensor], window: dict[str, int]
) -> None:
    """The recorded layer-0 cache: its first block un-roped, the others at their absolute frame."""
    block = block_of(case.meta)
    newest = window["cache_global_end_frames"]
    length = window["cache_local_end_frames"]
    frames = (*range(block), *range(newest - length + block, newest))
    keys, values = cache.layer(0).read(cache.slots(frames))
    rows, columns = case.meta["latent_hw"]
    _, ph, pw = case.meta["dit"]["patch_size"]
    grid = (rows // ph, columns // pw)
    pinned = block * case.meta["tokens_per_frame"]
    turn = rotation(frames[block:], grid, keys.shape[-1], CPU)
    roped = torch.cat([keys[:, :pinned], apply_rope(keys[:, pinned:], turn)], dim=1)
    stored = length * case.meta["tokens_per_frame"]
    assert_close(values, recorded["layer0_cache_v"][:, :stored], "values")
    assert_close(roped, recorded["layer0_cache_k"][:, :stored], "keys")


@pytest.mark.golden
@pytest.mark.parametrize("name", BLOCKWISE)
def test_rollouts_leave_the_recorded_cache(name: str, tmp_path: Path) -> None:
    """Values of every frame that both caches hold at the end, and keys, which the recording
    stores un-roped (Infinite-Forcing) or roped at their absolute frame (Self Forcing)."""
    case = load_case(name)
    meta, policy = case.meta, recorded_policy(case.meta)
    pipe = golden_pipeline(
        case,
        tmp_path,
        method="self_forcing" if policy.sink_position == "original" else "infinite_forcing",
        max_attention_frames=meta["max_attention_frames"],
        model_kwargs={"sink_size": policy.sink_frames, "local_attn_size": meta["local_attn_size"]},
    )
    stream = pipe._latent_stream(
        case.tensors["prompt_embeds"],
        num_latent_frames=meta["frames"],
        seed=None,
        noise=(case.tensors["noise"], case.tensors["eps"]),
    )
    for _ in stream:
        pass
    cache = stream.rollout.cache
    length, newest = meta["cache_end_frames"]["local_end"], meta["cache_end_frames"]["global_end"]
    theirs = (*range(policy.sink_frames), *range(newest - length + policy.sink_frames, newest))
    common = [frame for frame in theirs if cache.holds(frame)]
    assert len(common) > policy.sink_frames
    keys, values = cache.layer(0).read(cache.slots(tuple(common)))
    if policy.sink_position == "original":
        turn = rotation(tuple(common), pipe.shape.grid, keys.shape[-1], CPU)
        keys = apply_rope(keys, turn)
    places = [theirs.index(frame) for frame in common]
    for ours, name_of_theirs in ((keys, "layer0_cache_k"), (values, "layer0_cache_v")):
        per_frame = case.tensors[name_of_theirs].unflatten(1, (-1, meta["tokens_per_frame"]))
        assert_close(ours, per_frame[:, places].flatten(1, 2), name_of_theirs)


def assert_close(ours: Tensor, recorded: Tensor, what: str) -> None:
    torch.testing.assert_close(
        ours, recorded, atol=TOLERANCE, rtol=0, msg=lambda text: f"{what}: {text}"
    )
