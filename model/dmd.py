"""Distribution matching distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

The generator moves its samples along the difference of two scores: the teacher's (`real_score`)
and that of the samples themselves, tracked by the critic (`fake_score`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.result import LossResult
from wan.dit import TextContext, WanDiT
from wan.flow import NUM_TIMESTEPS, add_noise, shift_timesteps, x0_from_flow


@dataclass(frozen=True)
class Scores:
    """Predictions of x_0 `[B, F, C, h, w]` from the same noised samples."""

    fake: Tensor
    real_cond: Tensor
    real: Tensor


def score_timesteps(
    raw: Tensor, shift: float, *, lowest: float = 20.0, highest: float = 980.0
) -> Tensor:
    """Timesteps of the scores from integer draws in [0, 1000): shifted, then clamped."""
    return shift_timesteps(raw, shift).clamp(lowest, highest)


@torch.no_grad()
def predict_scores(
    real_score: WanDiT,
    fake_score: WanDiT,
    noisy: Tensor,
    timesteps: Tensor,
    *,
    real_text: TextContext,
    fake_text: TextContext,
    guidance_scale: float,
) -> Scores:
    """Both scores of `noisy` `[B, F, C, h, w]` at `timesteps` `[B, F]`.

    `real_text` holds the B conditional rows, then the B unconditional ones, which run in one
    batch: x_real = cond + g (cond - uncond).
    """
    fake = x0_from_flow(noisy, fake_score(noisy, timesteps, fake_text), timesteps)
    twice, at = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
    cond, uncond = x0_from_flow(twice, real_score(twice, at, real_text), at).chunk(2)
    return Scores(fake, cond, cond + guidance_scale * (cond - uncond))


def dmd_gradient(latents: Tensor, scores: Scores, *, normalise: bool = True) -> Tensor:
    """Gradient of the KL with respect to the samples (DMD, eq. 7), `[B, F, C, h, w]`.

    (x_fake - x_real) / mean|x - x_real|, the mean over one sample (eq. 8). A score that is not
    finite stays so: it has to stop the training.
    """
    difference = scores.fake - scores.real
    if not normalise:
        return difference
    distance = (latents - scores.real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    normalised = torch.nan_to_num(difference / distance)  # 0 / 0: nothing to move
    return torch.where(difference.isfinite(), normalised, difference)


def generator_loss(latents: Tensor, scores: Scores, mask: Tensor | None = None) -> LossResult:
    """A loss whose gradient with respect to `latents` is the DMD gradient (DMD2, Alg. 1).

    1/2 mean |x - sg(x - grad)|^2, over the frames where `mask` `[F]` is True.
    """
    gradient = dmd_gradient(latents.detach(), scores)
    target = (latents.detach() - gradient).double()
    distance = (latents.double() - target).square().mean(dim=(0, 2, 3, 4))  # [F]
    # Weights, not indices: a GPU need not wait to learn how many there are.
    weights = torch.ones_like(distance) if mask is None else mask.to(distance.dtype)
    loss = 0.5 * (distance * weights).sum() / weights.sum()
    samples = latents.detach()
    metrics = {
        "dmd/gradient_norm": gradient.abs().mean(),
        "critic/error": (scores.fake - samples).square().mean(),
        "teacher/error": (scores.real_cond - samples).square().mean(),
    }
    return LossResult(loss, metrics)


def critic_loss(
    fake_score: WanDiT, latents: Tensor, noise: Tensor, timesteps: Tensor, text: TextContext
) -> LossResult:
    """Flow matching of the critic on the student's samples: mean |v - (e - x)|^2.

    On the critic's own velocity, with sigma = t / 1000. The metric `critic/errors` is `[B]`.
    """
    flow = fake_score(add_noise(latents, noise, timesteps), timesteps, text)
    errors = (flow.float() - (noise - latents)).square().mean(dim=(1, 2, 3, 4))  # [B]
    metrics = {"critic/errors": errors.detach(), "critic/timesteps": timesteps[:, 0].detach()}
    return LossResult(errors.mean(), metrics)


def raw_timesteps(
    uniform: Tensor,
    lowest: int | Sequence[int] = 0,
    count: int = NUM_TIMESTEPS,
    *,
    end: float = NUM_TIMESTEPS,
) -> Tensor:
    """Timesteps in [lowest, end) on a grid of `count` below 1000 from uniform numbers in [0, 1).

    `lowest`: for all, or one for each. At least one point of the grid is left.
    """
    spacing = NUM_TIMESTEPS / count
    first = (torch.as_tensor(lowest, dtype=torch.float64) / spacing).round().to(uniform.dtype)
    points = (round(end / spacing) - first).clamp_min(1)
    return spacing * (first + (uniform * points).floor())
