"""Nothing is left on the CPU: the meta device stands in for a GPU and refuses to be mixed with it.

Levels that were kept on the CPU as one-element tensors used to meet latents on the GPU.
"""

import pytest
import torch

from model.dmd import (
    critic_loss,
    generator_loss,
    predict_scores,
    raw_timesteps,
    score_timesteps,
)
from model.flow_matching import flow_matching_loss
from model.ode_regression import ode_regression_loss
from model.self_rollout import RolloutDraw, scored_clip, self_rollout
from pipeline.prefix import Prefix
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from pipeline.text_to_video import VideoPipeline
from tests.conftest import TinyWorld
from tests.tiny_pipeline import random_dit
from utils.config import Config, load_config
from utils.noise import CounterNoise
from wan.context import MaskedContext, frame_mask
from wan.dit import WanDiT
from wan.flow import add_noise
from wan.vae import WanVAE

META = torch.device("meta")
METHODS = ["rolling_forcing", "self_forcing", "infinite_forcing"]


@pytest.fixture
def dit() -> WanDiT:
    return random_dit(num_layers=1).to(META).requires_grad_(True)


def config_of(world: TinyWorld, method: str) -> Config:
    shape = "image_or_video_shape=[1,7,16,4,6]"
    return load_config(world.config, [f"method={method}", shape, "num_training_frames=9"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rollouts_stay_on_their_device(tiny_world: TinyWorld, method: str, dit: WanDiT) -> None:
    setup = Setup.of(config_of(tiny_world, method), sizes=dit.config)
    pipe = VideoPipeline(setup, dit, vae=WanVAE.random(4).to(META))
    text = torch.zeros(2, 4, dit.config.text_dim, device=META)
    prefix = Prefix(torch.zeros(1, 3, 16, 4, 6, device=META))
    for given in (None, prefix):
        latents = pipe.generate_latents(text, 18, seed=0, prefix=given)
        assert latents.device == META
        assert latents.shape == (2, 18, 16, 4, 6)


@pytest.mark.parametrize("schedule", ["rolling", "block"])
def test_distillation_stays_on_its_device(
    tiny_world: TinyWorld, schedule: str, dit: WanDiT
) -> None:
    config = config_of(tiny_world, "rolling_forcing")
    noise = BlockNoise(CounterNoise(0, (16, 4, 6), 3), [0, 1], META)
    cond = dit.encode_text(torch.zeros(2, 4, dit.config.text_dim, device=META))
    both = dit.encode_text(torch.zeros(4, 4, dit.config.text_dim, device=META))
    plan = RolloutDraw("rolling" if schedule == "rolling" else "block", 3, (2,) * 3)
    setup = Setup.of(config, sizes=dit.config)
    latents = self_rollout(setup, dit, cond, noise, plan, scored_frames=7, grad=True)
    clip, counts = scored_clip(latents, WanVAE.random(4).to(META), scored=7, block_frames=3)
    timesteps = score_timesteps(raw_timesteps(torch.rand(2)), 5.0).to(META)[:, None].expand(-1, 7)
    noisy = add_noise(clip.detach(), torch.zeros_like(clip), timesteps)
    scores = predict_scores(
        dit, dit, noisy, timesteps, real_text=both, fake_text=cond, guidance_scale=3.0
    )
    generator_loss(clip, scores, counts).loss.backward()
    again = dit.encode_text(torch.zeros(2, 4, dit.config.text_dim, device=META))
    critic_loss(dit, clip.detach(), torch.zeros_like(clip), timesteps, again).loss.backward()
    assert all(p.grad is None or p.grad.device == META for p in dit.parameters())


def test_parallel_objectives_stay_on_their_device(dit: WanDiT) -> None:
    text = dit.encode_text(torch.zeros(2, 4, dit.config.text_dim, device=META))
    context = MaskedContext(frame_mask(6, 3), tuple(range(6)), (2, 3), dit.config.head_dim, META)
    latents = torch.zeros(2, 6, 16, 4, 6, device=META)
    levels = torch.zeros(2, 6, dtype=torch.int64, device=META)
    trajectory, timesteps = latents[:, None].expand(-1, 3, -1, -1, -1, -1), levels[0, :3].float()
    ode = ode_regression_loss(dit, trajectory, levels, timesteps, text, context, frames_in_loss=6.0)
    flow = flow_matching_loss(
        dit, latents, latents, levels.float(), text, shift=5.0, context=context
    )
    assert ode.loss.device == flow.loss.device == META
