"""Flow matching: (pre-)training and fine-tuning of a bidirectional or a block-causal network.

Rectified flow (arXiv 2209.03003), Wan2.1 Sec. 4.2.2; diffusion forcing gives every block its own
noise level (arXiv 2407.01392), teacher forcing lets it look back at clean blocks.
"""

import torch
from torch import Tensor

from model.result import LossResult
from wan.context import AttentionContext
from wan.dit import TextContext, WanDiT
from wan.flow import add_noise, training_weight


def flow_matching_loss(
    dit: WanDiT,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: TextContext,
    *,
    shift: float | None,
    context: AttentionContext | None = None,
    clean: Tensor | None = None,
    clean_timesteps: Tensor | None = None,
) -> LossResult:
    """E[w(t) |v_theta(x_t, t) - (e - x_0)|^2].

    `latents` and `noise` `[B, F, C, h, w]`, `timesteps` `[B, F]`. `shift` is that of the weights,
    see `training_weight`; with None w is 1. `context` None is full attention.
    With `clean` `[B, F, C, h, w]` (teacher forcing) the network sees these frames, at
    `clean_timesteps`, in front of the noisy ones; the context has to be made for `2F` frames.
    """
    noisy = add_noise(latents, noise, timesteps)
    if clean is None:
        flow = dit(noisy, timesteps, text, context)
    else:
        at = torch.zeros_like(timesteps) if clean_timesteps is None else clean_timesteps
        flow = flow_after(dit, noisy, timesteps, text, context, clean, at)
    error = (flow.float() - (noise - latents)).square().mean(dim=(2, 3, 4))  # [B, F]
    weight = 1.0 if shift is None else training_weight(timesteps, shift)
    return LossResult(
        (weight * error).mean(),
        {"flow/error": error.detach().mean(), "flow/timestep": timesteps.float().mean()},
    )


def flow_after(
    dit: WanDiT,
    noisy: Tensor,
    timesteps: Tensor,
    text: TextContext,
    context: AttentionContext | None,
    clean: Tensor,
    clean_timesteps: Tensor,
) -> Tensor:
    """The flow of `noisy` frames `[B, F, C, h, w]` behind as many clean ones (teacher forcing)."""
    frames, times = torch.cat([clean, noisy], dim=1), torch.cat([clean_timesteps, timesteps], dim=1)
    return dit(frames, times, text, context)[:, -noisy.shape[1] :]
