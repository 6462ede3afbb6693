"""Adapters: only they are trained, merging them gives the same network, runs resume."""

from pathlib import Path

import pytest
import torch

from model.lora import ADAPTER_A, ADAPTER_B, BASE, merge_lora
from pipeline import load_pipeline
from pipeline.setup import Setup
from tests.tiny_training import (
    TrainingWorld,
    assert_same_state,
    final_state,
    read_state,
    states,
    tensors,
    train,
)
from trainer.networks import build_generator
from trainer.sharding import open_world
from wan.checkpoints import read_state_dict
from wan.weights import Network

LORA = {"lora": {"rank": 2, "alpha": 6, "targets": ["q", "v", "ffn.0"]}, "keep_checkpoints": 9}
WEIGHTS = "/players/generator/weights/"


@pytest.mark.slow
def test_training_moves_adapters_alone_and_goes_on_bit_for_bit(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    train(training_world.config(tmp_path, max_steps=5, log_iters=1, **LORA), tmp_path / "once")
    first, *_, last = (read_state(path) for path in states(tmp_path / "once"))
    moved, still = set(), set()
    for name, value in tensors(first, WEIGHTS).items():
        (still if torch.equal(value, last[name]) else moved).add(name.removeprefix(WEIGHTS))
    adapters = {name for name in moved | still if ADAPTER_A in name or ADAPTER_B in name}
    assert moved == adapters
    assert len(adapters) == 2 * 2 * 5, "two layers; q and v of both attentions, and ffn.0"
    official = read_state_dict(training_world.models / "Student")
    assert {name.replace(BASE, ".") for name in still} == set(official)
    for name in still:
        assert torch.equal(last[WEIGHTS + name], official[name.replace(BASE, ".")]), name
    optimised = tensors(last, "/generator/optimiser", "exp_avg_sq")
    assert len(optimised) == len(adapters)
    averaged = {name.rpartition("/")[2] for name in tensors(last, "/generator/ema")}
    assert averaged == adapters

    often = LORA | {"log_iters": 1}
    train(training_world.config(tmp_path, max_steps=2, **often), tmp_path / "twice")
    train(training_world.config(tmp_path, max_steps=5, **often), tmp_path / "twice")
    assert_same_state(final_state(tmp_path / "twice"), last)


@pytest.mark.slow
def test_export_is_base_plus_scaled_product(training_world: TrainingWorld, tmp_path: Path) -> None:
    train(training_world.config(tmp_path, max_steps=3, **LORA), tmp_path / "run")
    state = final_state(tmp_path / "run")
    export = tmp_path / "run" / "checkpoint_model_000003"
    parts: dict[Network, str] = {"generator": "weights", "generator_ema": "ema"}
    for network, part in parts.items():
        merged = read_state_dict(export / "model.pt", network)
        layer = "blocks.1.self_attn.q"
        base = state[f"{WEIGHTS}{layer}.base_layer.weight"]
        down = state[f"/players/generator/{part}/{layer}.lora_A.default.weight"]
        up = state[f"/players/generator/{part}/{layer}.lora_B.default.weight"]
        assert up.any()
        torch.testing.assert_close(merged[f"{layer}.weight"], base + 6 / 2 * up @ down)
        untouched = "blocks.1.self_attn.k.weight"
        assert torch.equal(merged[untouched], state[WEIGHTS + untouched])
    pipe = load_pipeline(tmp_path / "run" / "config.yaml", export / "model.pt", device="cpu")
    assert pipe.generate(["grass"], 3, seed=0).shape == (1, 9, 16, 32, 3)


def test_a_network_with_adapters_starts_as_the_one_it_adapts_and_equals_its_merger(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.config(tmp_path, **LORA)
    latents, text = torch.randn(1, 3, 16, 2, 4), torch.randn(1, 4, 32)
    times = torch.full((1, 3), 500.0)
    with open_world("cpu") as world, torch.no_grad():
        setup = Setup.of(config)
        plain = build_generator(training_world.config(tmp_path), setup, world)
        adapted = build_generator(config, setup, world)
        expected = plain(latents, times, plain.encode_text(text))
        assert torch.equal(adapted(latents, times, adapted.encode_text(text)), expected)
        for name, parameter in adapted.named_parameters():
            if ADAPTER_B in name:
                parameter.normal_()
        changed = adapted(latents, times, adapted.encode_text(text))
        assert not torch.allclose(changed, expected, atol=1e-2)
        plain.load_state_dict(merge_lora(adapted.state_dict(), 2, 6))
        again = plain(latents, times, plain.encode_text(text))
        torch.testing.assert_close(again, changed, atol=1e-5, rtol=1e-5)
