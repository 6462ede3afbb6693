"""The linear flow between clean latents and noise, and its timesteps: one definition of each.

x_t = (1 - s) x_0 + s e with s = t / 1000, and the network predicts v = e - x_0 (rectified flow,
arXiv 2209.03003; Wan2.1 Sec. 4.2.2). Timesteps broadcast over trailing axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def sigma_of(timesteps: Tensor, like: Tensor) -> Tensor:
    """s = t / 1000 in float32, with trailing axes of size one to broadcast against `like`.

    A single timestep may be on the CPU whatever `like` is on: it stays a scalar.
    """
    sigma = timesteps.to(torch.float32) / NUM_TIMESTEPS
    if sigma.ndim == 0:
        return sigma
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """s' = k s / (1 + (k - 1) s): spends more of the schedule at high noise (SD3, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_timesteps(timesteps: Tensor, shift: float) -> Tensor:
    """`shift_sigma` for timesteps in [0, 1000]; float64 inside, float32 out."""
    sigma = timesteps.to(torch.float64) / NUM_TIMESTEPS
    return (NUM_TIMESTEPS * shift_sigma(sigma, shift)).to(torch.float32)


def denoising_timesteps(steps: Sequence[float], shift: float, *, warp: bool) -> Tensor:
    """Timestep of each level of a published `denoising_step_list`: `[T]`, float32, on the CPU."""
    timesteps = torch.tensor(steps, dtype=torch.float64)
    return shift_timesteps(timesteps, shift) if warp else timesteps.to(torch.float32)


def training_timesteps(shift: float) -> Tensor:
    """The shifted timesteps of indices 0 ... 999, from 1000 downwards: `[1000]`."""
    return shift_timesteps(torch.arange(NUM_TIMESTEPS, 0, -1), shift)


def training_weight(timesteps: Tensor, shift: float) -> Tensor:
    """Loss weight of a timestep: a Gaussian around t = 500, zero at its least, mean one.

    w(t) = (g(t) - min g) / mean(g - min g) over `training_timesteps(shift)`, with
    g(t) = exp(-2 ((t - 500) / 1000)^2).
    """

    def bell(t: Tensor) -> Tensor:
        return torch.exp(-2 * ((t.double() - NUM_TIMESTEPS / 2) / NUM_TIMESTEPS) ** 2)

    table = bell(training_timesteps(shift))
    floor = table.min()
    weight = (bell(timesteps) - floor.to(timesteps.device)) / (table - floor).mean().item()
    return weight.clamp(min=0).to(torch.float32)


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = (1 - s) x_0 + s e."""
    sigma = sigma_of(timesteps, clean)
    return (1 - sigma) * clean + sigma * noise


def x0_from_flow(noisy: Tensor, flow: Tensor, timesteps: Tensor) -> Tensor:
    """x_0 = x_t - s v."""
    return noisy - sigma_of(timesteps, noisy) * flow
