"""Causal consistency distillation: a start for the student from clean clips alone, without pairs.

The student learns the flow map of a causal teacher: from any state of the teacher's ODE, given the
clean past, to its end. One Euler step of the teacher with guidance leads to a neighbouring state,
and an average of the student's own weights says where that one ends.

Consistency models (arXiv 2303.01469), Sec. 4, eq. 7; for causal video Causal Forcing++ (arXiv
2605.15141), whose teacher and student start from one network of teacher forcing, with 48 steps, a
shift of 5, guidance 3 and an average of 0.99, as FastVideo's `causal_cd` has them; Causal-rCM
(arXiv 2606.25473) finds this the best start for DMD on self-rollouts. They never draw the last
step; here it is one of all: it ends clean, and ties the chain to the teacher.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.flow_matching import flow_after
from model.result import LossResult
from utils.devices import to_device
from utils.errors import UserError
from wan.context import AttentionContext
from wan.dit import TextContext, WanDiT
from wan.flow import NUM_TIMESTEPS, add_noise, shift_timesteps, sigma_of, x0_from_flow


def consistency_grid(levels: Tensor, steps: int, shift: float) -> Tensor:
    """Timesteps of the teacher's steps, falling, the last one 0: `[steps + 1]`, float32.

    The student's `levels` `[T]` are among them, with equally many steps from each one to the next,
    even before the shift. UserError unless `steps` is a multiple of T.
    """
    if steps % len(levels):
        raise UserError(
            f"consistency_steps={steps} is no multiple of the {len(levels)} levels of "
            "denoising_step_list"
        )
    even = torch.cat([shift_timesteps(levels, 1 / shift), torch.zeros(1)]).double()
    between = torch.arange(steps // len(levels), dtype=torch.float64) * len(levels) / steps
    inner = even[:-1, None] + between * (even[1:] - even[:-1])[:, None]  # [T, steps / T]
    grid = shift_timesteps(inner.flatten().clamp(max=NUM_TIMESTEPS), shift)
    grid[:: steps // len(levels)] = levels
    return torch.cat([grid, torch.zeros(1)])


@torch.no_grad()
def consistency_target(
    target: WanDiT,
    teacher: WanDiT,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    following: Tensor,
    *,
    target_text: TextContext,
    teacher_text: TextContext,
    guidance_scale: float,
    context: AttentionContext,
    clean: Tensor,
    clean_timesteps: Tensor,
) -> Tensor:
    """x_0^target(x_t', t') with x_t' = x_t + (s' - s) v^teacher(x_t, t): `[B, F, C, h, w]`.

    `latents` (x_0) and `noise` `[B, F, C, h, w]`; `timesteps` t and `following` t' below it
    `[B, F]`, of neighbours on the teacher's grid. Both networks see the frames `clean`, at
    `clean_timesteps`, through `context`. `teacher_text` holds the B conditional rows, and with
    guidance g the B unconditional ones behind them: v = cond + g (cond - uncond).
    """
    noisy = add_noise(latents, noise, timesteps)
    step = sigma_of(following, latents) - sigma_of(timesteps, latents)
    past = (clean, clean_timesteps)
    flow = _guided_flow(teacher, noisy, timesteps, teacher_text, guidance_scale, context, past)
    return _end(target, noisy + step * flow, following, target_text, context, past)


def consistency_loss(
    student: WanDiT,
    end: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    text: TextContext,
    context: AttentionContext,
    clean: Tensor,
    clean_timesteps: Tensor,
) -> LossResult:
    """mean |x_0^student(x_t, t) - end|^2, with the end that `consistency_target` says."""
    noisy, past = add_noise(latents, noise, timesteps), (clean, clean_timesteps)
    x0 = _end(student, noisy, timesteps, text, context, past)
    metrics = {
        "consistency/error": (x0.detach() - latents).square().mean(),
        "consistency/timestep": timesteps.float().mean(),
    }
    return LossResult((x0.float() - end).square().mean(), metrics)


@torch.no_grad()
def flow_map_error(
    student: WanDiT,
    teacher: WanDiT,
    latents: Tensor,
    noise: Tensor,
    grid: Tensor,
    places: Tensor,
    *,
    student_text: TextContext,
    teacher_text: TextContext,
    guidance_scale: float,
    context: AttentionContext,
    clean: Tensor,
    clean_timesteps: Tensor,
    look: Callable[[], None],
) -> LossResult:
    """mean |x_0^student(x_t, t) - x_0|^2, x_0 where the teacher's ODE leads from x_t.

    What a consistency training is for; its loss tells how far neighbours are apart, and hardly
    changes. `places` `[B, F]` of t on the `grid`. All frames make as many passes as from the
    highest noise, so that ranks that share weights do. `look` is called behind each of the ODE's;
    what it raises ends the work.
    """
    last, on, past = len(grid) - 1, latents.device, (clean, clean_timesteps)
    times = [to_device(grid[(places + n).clamp(max=last)], on) for n in range(last + 1)]
    sigmas = [sigma_of(each, latents) for each in times]
    noisy = state = add_noise(latents, noise, times[0])
    for at, sigma, following in zip(times, sigmas, sigmas[1:], strict=False):
        flow = _guided_flow(teacher, state, at, teacher_text, guidance_scale, context, past)
        state = state + (following - sigma) * flow
        look()
    x0 = _end(student, noisy, times[0], student_text, context, past)
    return LossResult((x0 - state).square().mean(), {})


def _end(
    dit: WanDiT,
    noisy: Tensor,
    timesteps: Tensor,
    text: TextContext,
    context: AttentionContext,
    past: tuple[Tensor, Tensor],
) -> Tensor:
    """x_0 where a network that has learnt the flow map says that `noisy` ends."""
    return x0_from_flow(noisy, flow_after(dit, noisy, timesteps, text, context, *past), timesteps)


def _guided_flow(
    teacher: WanDiT,
    noisy: Tensor,
    timesteps: Tensor,
    text: TextContext,
    guidance_scale: float,
    context: AttentionContext,
    past: tuple[Tensor, Tensor],
) -> Tensor:
    if guidance_scale == 0:
        return flow_after(teacher, noisy, timesteps, text, context, *past)
    twice = [torch.cat([x, x]) for x in (noisy, timesteps, *past)]
    flow = flow_after(teacher, twice[0], twice[1], text, context, *twice[2:])
    cond, uncond = flow.chunk(2)
    return cond + guidance_scale * (cond - uncond)
