"""Recorded attention: sums to 1, equals a plain softmax, changes nothing."""

import pytest
import torch

import wan.recording
from tests.tiny_pipeline import random_dit
from tests.tiny_rollout import new_rollout, run, tiny_method
from wan.context import CachedContext
from wan.kv_cache import ContextPolicy, KVCache, View
from wan.recording import RecordingContext, frame_masses

TOKENS, HEADS, DIM = 4, 2, 12


def some_qk(query_frames=3, key_frames=5):
    generator = torch.Generator().manual_seed(0)
    q, k = (
        3 * torch.randn(2, frames * TOKENS, HEADS, DIM, generator=generator)
        for frames in (query_frames, key_frames)
    )
    return q, k


@pytest.mark.parametrize("elements", [1, 3 * 2 * 20 * 2, 2**23])
def test_masses_equal_a_plain_softmax_whatever_the_chunk(monkeypatch, elements):
    monkeypatch.setattr(wan.recording, "CHUNK_ELEMENTS", elements)
    q, k = some_qk()
    masses = frame_masses(q, k, TOKENS, [2, 1])
    naive = []
    for first, last in [(0, 2), (2, 3)]:
        queries = q[:, first * TOKENS : last * TOKENS].double()
        scores = torch.einsum("bqhd,bkhd->bqhk", queries, k.double()) / DIM**0.5
        weights = torch.softmax(scores, -1).mean((0, 1, 2))
        naive.append(weights.reshape(5, TOKENS).sum(1))
    torch.testing.assert_close(masses, torch.stack(naive).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(masses.sum(1), torch.ones(2))


def test_masses_follow_a_key_that_all_queries_want():
    q = torch.ones(1, TOKENS, HEADS, DIM)
    k = torch.zeros(1, 3 * TOKENS, HEADS, DIM)
    k[:, TOKENS : 2 * TOKENS] = 10
    torch.testing.assert_close(frame_masses(q, k, TOKENS, [1]), torch.tensor([[0.0, 1.0, 0.0]]))


def test_half_precision_is_summed_in_float32():
    q, k = (x.bfloat16() for x in some_qk())
    masses = frame_masses(q, k, TOKENS, [3])
    assert masses.dtype == torch.float32
    torch.testing.assert_close(masses.sum(1), torch.ones(1))


def test_a_recorded_clean_pass_writes_the_cache_once_and_reads_it_before():
    """Its own frames may overwrite the oldest ones that it still has to read."""
    policy = ContextPolicy(0, 4, clean_pass_sees_sink=False)
    outputs, caches = [], []
    for recorded in (False, True):
        cache = KVCache(
            num_layers=1,
            num_heads=HEADS,
            head_dim=DIM,
            tokens_per_frame=TOKENS,
            latent=(1, 1, 1),
            sink_frames=0,
            recent_frames=2,
            batch=2,
            dtype=torch.float32,
            device="cpu",
        )
        for frame in range(4):
            view = policy.view(cache.finished, 2, clean_pass=True)
            view = View(view.frames[-2:], tuple(range(len(view.frames[-2:]) + 2)))
            context = CachedContext(cache, view, (2, 2), DIM, write=True)
            q, k = (x + frame for x in some_qk(2, 2))
            if recorded:
                context = RecordingContext(context, [2], [0], lambda layer, masses: None)
            outputs.append(context.of(0).attend(q, k, k, "auto"))
            cache.commit(torch.zeros(2, 2, 1, 1, 1))
        caches.append(cache.state_dict())
    for plain, watched in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.equal(plain, watched)
    assert torch.equal(caches[0]["keys"], caches[1]["keys"])


@pytest.mark.parametrize("method", ["rolling", "self", "self with sink", "infinite", "averaged"])
def test_recording_every_pass_changes_no_bit(method):
    dit = random_dit()
    kind = tiny_method(method)
    plain = run(new_rollout(dit, kind, 5))
    rollout = new_rollout(dit, kind, 5)
    sums = []

    def wrap(context, window):
        frames = [2] * (1 if window is None else len(window.levels))
        return RecordingContext(context, frames, {0, 1}, lambda _, m: sums.append(m.sum(1)))

    rollout.wrap_context = wrap
    recorded = run(rollout)
    assert plain.keys() == recorded.keys()
    assert all(torch.equal(plain[block], recorded[block]) for block in plain)
    torch.testing.assert_close(torch.cat(sums), torch.ones(sum(map(len, sums))))
