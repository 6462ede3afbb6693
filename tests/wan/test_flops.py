"""The formulas against what PyTorch counts in real passes, and against the published sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from pipeline.passes import Plan
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise, Renoise
from pipeline.schedule import BlockLayout, Schedule
from tests.golden_cases import load_json
from tests.tiny_pipeline import random_dit
from utils.noise import CounterNoise
from wan.dit import DiTConfig
from wan.flops import blocks_flops, edge_flops, forward_flops, pass_flops, text_flops
from wan.geometry import VideoShape
from wan.kv_cache import ContextPolicy, KVCache

TERA = 10**12
BLOCK, LEVELS = 3, 5


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def cpu_sdpa_flops(query, key, value, *args, out_shape=None, **kwargs):
    """PyTorch counts SDPA on a GPU only; the same count for its CPU kernel."""
    return sdpa_flop_count(query, key, value)


def tiny_rollout(height, width, batch=1, **options):
    dit = random_dit()
    config = dit.config
    shape = VideoShape(height, width)
    policy = ContextPolicy(BLOCK, 21, clean_pass_sees_sink=False, **options)
    cache = KVCache(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        tokens_per_frame=shape.tokens_per_frame,
        latent=shape.latent,
        sink_frames=BLOCK,
        recent_frames=18,
        batch=batch,
        dtype=torch.float32,
        device="cpu",
    )
    noise = BlockNoise(CounterNoise(0, shape.latent, BLOCK), [0] * batch, "cpu")
    text = torch.randn(batch, 7, config.text_dim, generator=torch.Generator().manual_seed(0))
    rollout = Rollout(
        dit,
        Plan(Schedule("rolling", LEVELS), BlockLayout(BLOCK), policy),
        cache=cache,
        grid=shape.grid,
        rule=Renoise(torch.linspace(1000, 200, LEVELS), noise),
        noise=noise,
        text=dit.encode_text(text),
    )
    return rollout, shape


def counted(run):
    """What FlopCounterMode counts in `run()`: in all, and in the transformer blocks."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    blocks = [n for name, n in by_module.items() if is_block(name)]
    return counter.get_total_flops(), sum(blocks), by_module


def is_block(name):
    parts = name.split(".")
    return len(parts) == 3 and parts[1] == "blocks"


class CountedDiT:
    """The network in a rollout; `passes` lists each call's context and what it cost."""

    def __init__(self, dit):
        self.dit = dit
        self.config = dit.config
        self.attention_backend = dit.attention_backend
        self.passes = []

    def __call__(self, latents, timesteps, text, context):
        flow = []
        cost = counted(lambda: flow.append(self.dit(latents, timesteps, text, context)))
        self.passes.append((context, *cost))
        return flow[0]


@pytest.mark.parametrize(("size", "batch"), [((64, 64), 1), ((32, 80), 1), ((32, 32), 2)])
def test_a_steady_step_costs_exactly_the_formula(size, batch):
    """One window pass and one clean pass: no text MLP, no text K/V, no history computed again."""
    rollout, shape = tiny_rollout(*size, batch=batch)
    for _ in range(LEVELS + 8):
        rollout.step()
    config, tokens = rollout.dit.config, shape.tokens_per_frame
    rollout.dit = CountedDiT(rollout.dit)
    rollout.step()
    window_frames = BLOCK * LEVELS
    expected = {True: (BLOCK, 21), False: (window_frames, 21)}  # writes? -> frames, keys
    assert [context.destination is not None for context, *_ in rollout.dit.passes] == [True, False]
    for context, total, in_blocks, by_module in rollout.dit.passes:
        frames, keys = expected[context.destination is not None]
        of_blocks = batch * blocks_flops(config, frames * tokens, keys * tokens)
        assert in_blocks == of_blocks
        assert total - in_blocks == batch * edge_flops(config, frames, tokens)
        assert total == batch * forward_flops(config, frames, keys, tokens)
        assert not any("text_embedding" in name for name in by_module)


@pytest.mark.parametrize("window", ["full", "block_causal"])
def test_a_whole_steady_step_has_nothing_beside_its_passes(window):
    rollout, shape = tiny_rollout(32, 32, window_attention=window)
    for _ in range(LEVELS + 8):
        rollout.step()
    config, tokens = rollout.dit.config, shape.tokens_per_frame
    finished = rollout.cache.finished
    clean = rollout.plan.policy.view(finished, BLOCK, clean_pass=True)
    window = rollout.plan.policy.view(finished + BLOCK, BLOCK * LEVELS, blocks=[BLOCK] * LEVELS)
    expected = sum(pass_flops(config, view, tokens) for view in (clean, window))
    total, _, _ = counted(rollout.step)
    assert total == expected


def test_the_text_costs_its_formula_once():
    dit = random_dit()
    total, _, _ = counted(lambda: dit.encode_text(torch.zeros(1, 3, dit.config.text_dim)))
    assert total == text_flops(dit.config)


def test_full_attention_costs_the_formula():
    dit = random_dit()
    latents = torch.randn(2, 4, dit.config.in_dim, 4, 6)
    text = dit.encode_text(torch.zeros(2, 3, dit.config.text_dim))
    total, _, _ = counted(lambda: dit(latents, torch.full((2, 4), 500.0), text))
    assert total == 2 * forward_flops(dit.config, 4, 4, 6)


# --- the published model at its published size ---------------------------------------------------


@pytest.fixture
def published():
    recorded = load_json("manifest_wan2.1_t2v_1.3B_dit")["config"]
    config = DiTConfig.from_dict(recorded)
    policy = ContextPolicy(BLOCK, 21, clean_pass_sees_sink=False)
    return config, policy, VideoShape(480, 832).tokens_per_frame


def tera(config, view, tokens):
    """Of the blocks, as the published estimates count."""
    queries = len(view.positions) - len(view.frames)
    return blocks_flops(config, queries * tokens, len(view.positions) * tokens) / TERA


@pytest.mark.golden
def test_the_table_of_a_steady_block(published):
    config, policy, tokens = published
    window = tera(config, policy.view(30, BLOCK * LEVELS), tokens)
    clean = tera(config, policy.view(30, BLOCK, clean_pass=True), tokens)
    assert window == pytest.approx(202.0, abs=0.05)
    assert clean == pytest.approx(40.4, abs=0.05)
    assert window + clean == pytest.approx(242.4, abs=0.05)


@pytest.mark.golden
def test_the_table_of_the_first_block(published):
    """Five growing windows and one clean pass, the only one that is read."""
    config, policy, tokens = published
    windows = [tera(config, policy.view(0, BLOCK * n), tokens) for n in range(1, LEVELS + 1)]
    clean = tera(config, policy.view(0, BLOCK, clean_pass=True), tokens)
    assert sum(windows) + clean == pytest.approx(420, abs=0.5)
    assert sum(windows) + LEVELS * clean == pytest.approx(485, abs=0.5)


def test_the_engine_runs_no_clean_pass_that_is_not_read():
    rollout, _ = tiny_rollout(32, 32)
    kinds = []
    rollout.dit.register_forward_pre_hook(
        lambda _, arguments: kinds.append(arguments[3].destination is not None)
    )
    for _ in range(LEVELS + 1):
        rollout.step()
    assert kinds == [False] * LEVELS + [True, False]
