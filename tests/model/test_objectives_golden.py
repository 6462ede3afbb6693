"""Objectives against the published implementations.

sigma = t / 1000 exactly, where the published code looks it up in a table (see the golden README):
hence 1e-3 relative to the largest magnitude for everything that passes through the scores.
"""

import pytest
import torch
from torch import Tensor

from model.dmd import critic_loss, dmd_gradient, generator_loss, predict_scores, score_timesteps
from model.ode_regression import block_levels, ode_regression_loss
from tests.golden_cases import Case, load_case, load_weights
from wan.context import MaskedContext, frame_mask
from wan.dit import DiTConfig, WanDiT
from wan.flow import add_noise

pytestmark = pytest.mark.golden


def network(case: Case, weights: str) -> WanDiT:
    dit = WanDiT(DiTConfig.from_dict(case.meta["dit"]))
    dit.load_state_dict(load_weights(weights))
    return dit


def close(ours: Tensor, recorded: Tensor, relative: float = 1e-3) -> None:
    scale = recorded.abs().max().item()
    torch.testing.assert_close(
        ours.double(), recorded.double(), atol=relative * scale, rtol=0, check_dtype=False
    )


def test_dmd_gradient_losses_and_their_gradients() -> None:
    case = load_case("dmd")
    t, meta = case.tensors, case.meta
    real = network(case, meta["weights"]["real_score"])
    fake = network(case, meta["weights"]["fake_score"])
    frames = t["latents"].shape[1]

    timesteps = score_timesteps(
        t["raw_timestep"], meta["timestep_shift"], lowest=meta["min_step"], highest=meta["max_step"]
    )
    timesteps = timesteps.expand(-1, frames)
    close(timesteps, t["dmd_timestep"], 1e-6)
    noisy = add_noise(t["latents"], t["noise"], timesteps)
    close(noisy, t["dmd_noisy"])

    scores = predict_scores(
        real,
        fake,
        noisy,
        timesteps,
        real_text=real.encode_text(torch.cat([t["cond"], t["uncond"]])),
        fake_text=fake.encode_text(t["cond"]),
        guidance_scale=meta["guidance_scale"],
    )
    close(dmd_gradient(t["latents"], scores), t["kl_grad"])
    close(dmd_gradient(t["latents"], scores, normalise=False), t["kl_grad_unnormalised"])

    frame_mask_ = t["gradient_mask"][0, :, 0, 0, 0]
    for mask, prefix in ((None, ""), (frame_mask_, "masked_")):
        latents = t["latents"].clone().requires_grad_()
        result = generator_loss(latents, scores, mask)
        close(result.loss, t[f"{prefix}dmd_loss"])
        (gradient,) = torch.autograd.grad(result.loss, latents)
        close(gradient, t[f"{prefix}dmd_latent_grad"])
    close(result.metrics["dmd/gradient_norm"], t["dmd_gradient_norm"])

    critic_timesteps = score_timesteps(
        t["critic_raw_timestep"],
        meta["timestep_shift"],
        lowest=meta["min_step"],
        highest=meta["max_step"],
    ).expand(-1, frames)
    close(critic_timesteps, t["critic_timestep"], 1e-6)
    text = fake.encode_text(t["cond"])
    result = critic_loss(fake, t["latents"], t["critic_noise"], critic_timesteps, text)
    close(result.loss, t["critic_loss"])
    result.loss.backward()
    named = dict(fake.named_parameters())
    for key, recorded in t.items():
        if key.startswith("critic_grad."):
            close(named[key.removeprefix("critic_grad.")].grad, recorded)
    norm = torch.stack([p.grad.norm() for p in fake.parameters() if p.grad is not None]).norm()
    close(norm, t["critic_grad_norm_all"])


def test_ode_regression() -> None:
    case = load_case("ode_regression")
    t, block = case.tensors, case.meta["num_frame_per_block"]
    dit = network(case, case.meta["weights"])
    frames = t["raw_index"].shape[1]
    levels = block_levels(t["raw_index"], list(range(0, frames, block)))
    assert torch.equal(levels, t["index"])
    rows, columns = case.meta["latent_hw"]
    _, ph, pw = dit.config.patch_size
    context = MaskedContext(
        frame_mask(frames, block),
        tuple(range(frames)),
        (rows // ph, columns // pw),
        dit.config.head_dim,
        torch.device("cpu"),
    )
    text = dit.encode_text(t["prompt_embeds"])
    result = ode_regression_loss(
        dit, t["ode_latent"], levels, t["denoising_step_list"], text, context
    )
    torch.testing.assert_close(result.loss, t["loss"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        result.metrics["ode/error_all_frames"], t["unnormalized_loss"].mean(), atol=1e-4, rtol=0
    )
    result.loss.backward()
    named = dict(dit.named_parameters())
    for key, recorded in t.items():
        if key.startswith("grad."):
            torch.testing.assert_close(
                named[key.removeprefix("grad.")].grad, recorded, atol=1e-4, rtol=1e-4
            )
