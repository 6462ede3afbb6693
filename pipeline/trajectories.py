"""Trajectories of the teacher's ODE: the data that the student is initialised on.

CausVid (arXiv 2412.07772), Sec. 4.3. The bidirectional teacher runs on the one rollout engine (all
frames in one window); a step rule that keeps what passes through it collects the states.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.sampling import BlockNoise, OdeStep, StepRule
from pipeline.schedule import Schedule
from pipeline.setup import Setup
from utils.errors import UserError
from utils.noise import NoiseSource
from wan.dit import WanDiT
from wan.flow import NUM_TIMESTEPS, shift_timesteps

SAME_TIMESTEP = 1e-3  # timesteps nearer to each other than this are one


def ode_grid(levels: Tensor, num_steps: int, shift: float) -> Tensor:
    """Timesteps of the Euler steps, falling: `num_steps` shifted ones, and `levels` among them.

    s_i = shift(1 - i / n) for i < n, as the published trajectories are made; levels that are not
    on that grid are added to it, so that no state has to be interpolated.
    """
    if num_steps < 1:
        raise UserError(f"--num_steps {num_steps} must be at least 1")
    even = torch.arange(num_steps, 0, -1, dtype=torch.float64) * NUM_TIMESTEPS / num_steps
    even = shift_timesteps(even, shift)
    distance = (even[:, None] - levels).abs().amin(dim=1)
    return torch.cat([even[distance > SAME_TIMESTEP], levels]).sort(descending=True).values


class KeepStates:
    """A step rule that keeps each block's input at some levels, and its clean end."""

    def __init__(self, rule: StepRule, levels: Sequence[int]) -> None:
        self.rule = rule
        self.timesteps = rule.timesteps
        self.levels = frozenset(levels)
        self.states: dict[int, list[Tensor]] = {}

    @property
    def remembered(self) -> dict[int, Any]:
        """See `StepRule`: what the rule within remembers."""
        return self.rule.remembered

    @remembered.setter
    def remembered(self, blocks: dict[int, Any]) -> None:
        self.rule.remembered = blocks

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """See `StepRule`."""
        kept = self.states.setdefault(block, [])
        if level in self.levels:
            kept.append(noisy)
        moved = self.rule.advance(block, level, noisy, flow, last=last)
        if last:
            kept.append(moved)
        return moved

    def trajectory(self) -> Tensor:
        """The states so far, of all blocks in order of time: `[B, S, F, C, h, w]`."""
        blocks = [torch.stack(states, dim=1) for _, states in sorted(self.states.items())]
        return torch.cat(blocks, dim=2)

    def state_dict(self) -> dict[int, Any]:
        """See `StepRule`."""
        return self.rule.state_dict()

    def load_state_dict(self, state: Mapping[int, Any], device: torch.device) -> None:
        """See `StepRule`."""
        self.rule.load_state_dict(state, device)


@torch.no_grad()
def solve_trajectories(
    setup: Setup,
    teacher: WanDiT,
    text: Tensor,
    *,
    levels: Tensor,
    grid: Tensor,
    num_latent_frames: int,
    noise: NoiseSource,
    samples: Sequence[int],
    guidance_scale: float | None,
) -> Tensor:
    """States at the timesteps `levels` `[T]` and the clean end: `[B, T + 1, F, C, h, w]`, float32.

    Euler steps through `grid`, which holds `levels` (see `ode_grid`); row i starts from the noise
    of `samples[i]`. `text`: embeddings `[B, L, text_dim]`, or `[2B, L, text_dim]`, unconditional
    rows last, with `guidance_scale` g in v_uncond + g (v_cond - v_uncond). Of the setup only sizes
    count. Raises UserError unless `num_latent_frames` fill whole blocks.
    """
    setup = setup.bidirectional()
    kept = [int((grid - level).abs().argmin()) for level in levels]
    rule = KeepStates(OdeStep.at(grid), kept)
    rollout = setup.rollout(
        teacher,
        Schedule("full", len(grid), setup.layout.require_full_blocks(num_latent_frames)),
        text=teacher.encode_text(text.to(teacher.device)),
        noise=BlockNoise(noise, samples, teacher.device),
        rule=rule,
        guidance_scale=guidance_scale,
    )
    while rollout.step() is not None:
        pass
    return rule.trajectory()
