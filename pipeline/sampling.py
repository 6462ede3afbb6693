"""How a block goes from one level to the next: re-noise its x_0, or step along the ODE."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from utils.noise import NoiseSource
from wan.flow import NUM_TIMESTEPS, add_noise, x0_from_flow

Sampler = Literal["unipc", "dpm++", "euler"]


class BlockNoise:
    """Noise of a batch: row i is the noise of `samples[i]`, whatever else is in the batch."""

    def __init__(
        self, source: NoiseSource, samples: Sequence[int], device: torch.device | str
    ) -> None:
        self.source = source
        self.samples = tuple(samples)
        self.device = device

    def __call__(self, block: int, level: int) -> Tensor:
        """`[B, f, C, H, W]`, float32."""
        draws = {sample: self.source(sample, block, level) for sample in set(self.samples)}
        return torch.stack([draws[sample] for sample in self.samples]).to(self.device)


class StepRule(Protocol):
    """What becomes of a block after a forward pass at one of its levels."""

    timesteps: Tensor

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """The block's input at `level + 1`, or its clean latents if this level is its `last`."""
        ...


class Renoise:
    """Distilled models: predict x_0, noise it afresh to the next level (consistency sampling)."""

    def __init__(self, timesteps: Tensor, noise: BlockNoise) -> None:
        self.timesteps = timesteps
        self.noise = noise

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """See `StepRule`."""
        clean = x0_from_flow(noisy, flow, self.timesteps[level])
        if last:
            return clean
        return add_noise(clean, self.noise(block, level + 1), self.timesteps[level + 1])


class OdeStep:
    """Models that are not distilled: one solver of diffusers per block in flight.

    Multi-step solvers carry history, so a block's solver lives from its first level to its last.
    """

    def __init__(self, template: Any) -> None:
        """`template`: a diffusers scheduler whose timesteps are set."""
        self._template = template
        self._solvers: dict[int, Any] = {}
        self.timesteps = template.timesteps.to("cpu", torch.float32)

    @classmethod
    def with_steps(
        cls, sampler: Sampler, num_steps: int, shift: float, device: torch.device
    ) -> "OdeStep":
        """A named solver with `num_steps` steps spread by the timestep shift."""
        scheduler = make_scheduler(sampler, shift)
        scheduler.set_timesteps(num_steps, device=device)
        return cls(scheduler)

    @classmethod
    def at(cls, timesteps: Tensor, device: torch.device) -> "OdeStep":
        """Euler steps between given timesteps `[T]`, and from the last one to 0."""
        scheduler = make_scheduler("euler", shift=1.0)
        scheduler.set_timesteps(sigmas=(timesteps / NUM_TIMESTEPS).tolist(), device=device)
        return cls(scheduler)

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """See `StepRule`."""
        if level == 0:
            self._solvers[block] = copy.deepcopy(self._template)
        solver = self._solvers[block]
        moved = solver.step(flow, solver.timesteps[level], noisy).prev_sample
        if last:
            del self._solvers[block]
        return moved


def make_scheduler(sampler: Sampler, shift: float) -> Any:
    """A diffusers scheduler for v-prediction on the linear flow with this timestep shift."""
    import diffusers

    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(NUM_TIMESTEPS, shift=shift)
    kind = {
        "unipc": diffusers.UniPCMultistepScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
    }[sampler]
    return kind(
        NUM_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
