"""ODE initialisation: the block-causal student regresses the teacher's trajectories.

CausVid (arXiv 2412.07772), Sec. 4.3, eq. 6: from a state of the teacher's ODE at one of the
student's levels, predict the clean end of the same trajectory.
"""

import torch
from torch import Tensor

from model.result import LossResult
from wan.context import AttentionContext
from wan.dit import TextContext, WanDiT
from wan.flow import x0_from_flow


def block_levels(draws: Tensor, block_starts: list[int]) -> Tensor:
    """One level per block: every frame takes the draw of its block's first frame, `[B, F]`."""
    levels = draws.clone()
    for start, end in zip(block_starts, [*block_starts[1:], draws.shape[1]], strict=True):
        levels[:, start:end] = draws[:, start : start + 1]
    return levels


def ode_inputs(trajectory: Tensor, levels: Tensor) -> Tensor:
    """The trajectory's state of each frame's level: `[B, S, F, C, h, w]`, `[B, F]` -> latents."""
    index = levels[:, None, :, None, None, None].expand(-1, 1, -1, *trajectory.shape[3:])
    return trajectory.gather(1, index)[:, 0]


def ode_regression_loss(
    dit: WanDiT,
    trajectory: Tensor,
    levels: Tensor,
    timesteps: Tensor,
    text: TextContext,
    context: AttentionContext,
    *,
    frames_in_loss: float | None = None,
) -> LossResult:
    """Mean |x_0^theta - x_0|^2 over the frames whose state is not clean already.

    `trajectory` `[B, S, F, C, h, w]`, noisy to clean; `timesteps` `[S]` of its states (the last is
    0); `levels` `[B, F]`, equal within a block. `frames_in_loss` replaces the number of noisy
    frames in this batch as the denominator, so that parts of a larger batch add up exactly.
    """
    noisy, per_frame = ode_inputs(trajectory, levels), timesteps[levels]
    clean = trajectory[:, -1]
    flow = dit(noisy, per_frame, text, context)
    x0 = x0_from_flow(noisy, flow, per_frame)
    error = (x0.float() - clean).square().mean(dim=(2, 3, 4))  # [B, F]
    counted = per_frame > 0
    total = counted.sum().clamp(min=1) if frames_in_loss is None else frames_in_loss
    loss = torch.where(counted, error, 0.0).sum() / total
    return LossResult(loss, {"ode/error_all_frames": error.detach().mean()})
