"""How a block goes from one level to the next: re-noise its x_0, or step along the ODE."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from utils.devices import to_device
from utils.noise import NoiseSource
from wan.flow import NUM_TIMESTEPS, add_noise, shift_timesteps, x0_from_flow

Sampler = Literal["unipc", "dpm++", "euler"]


class BlockNoise:
    """Noise of a batch: row i is the noise of `samples[i]`, whatever else is in the batch.

    `sources`: the block from which each source is drawn from, in order.

    Every block asks for what the block before it asked for. So with a GPU what a pass took is drawn
    for the next block by `draw_ahead`, while the GPU computes.
    """

    def __init__(
        self, source: NoiseSource, samples: Sequence[int], device: torch.device | str
    ) -> None:
        self.sources: list[tuple[int, NoiseSource]] = [(0, source)]
        self.samples = tuple(samples)
        self.device = torch.device(device)
        self._asked: set[tuple[int, int]] = set()
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def __call__(self, block: int, level: int) -> Tensor:
        """`[B, f, C, H, W]`, float32."""
        self._asked.add((block, level))
        drawn = self._drawn.pop((block, level), None)
        return self._draw(block, level) if drawn is None else drawn

    def draw_ahead(self, end: int | None) -> None:
        """Draw for the next block, up to `end`, what was asked for since the last time."""
        if self._asked and self.device.type == "cuda":
            oldest = min(block for block, _ in self._asked)
            self._drawn = {key: noise for key, noise in self._drawn.items() if key[0] >= oldest}
            for block, level in {(block + 1, level) for block, level in self._asked} - self._asked:
                if end is None or block < end:
                    self._drawn[block, level] = self._draw(block, level)
        self._asked.clear()

    def _draw(self, block: int, level: int) -> Tensor:
        source = next(source for first, source in reversed(self.sources) if block >= first)
        draws = {sample: source(sample, block, level) for sample in set(self.samples)}
        return to_device(torch.stack([draws[sample] for sample in self.samples]), self.device)

    def restore(self, changes: Sequence[tuple[int, NoiseSource]]) -> None:
        """As it was made, and changed from these blocks on."""
        self._drawn.clear()
        self.sources = [self.sources[0], *changes]

    def change(self, source: NoiseSource, block: int) -> None:
        """Draw from another source from `block` on."""
        self._drawn.clear()
        kept = [(first, old) for first, old in self.sources if first < block]
        self.sources = [*kept, (block, source)]


class StepRule(Protocol):
    """What becomes of a block after a forward pass at one of its levels.

    `remembered`: what is known of blocks in flight, by block. A step puts new values in and never
    changes old ones, so that whoever kept a copy of the mapping can go back to it.
    """

    timesteps: Tensor
    remembered: dict[int, Any]

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """The block's input at `level + 1`, or its clean latents if this level is its `last`."""
        ...

    def state_dict(self) -> dict[int, Any]:
        """What the rule remembers of blocks in flight, by block: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[int, Any], device: torch.device) -> None:
        """Go on where another rule of the same kind stood."""
        ...


class Renoise:
    """Distilled models: predict x_0, noise it afresh to the next level (consistency sampling)."""

    def __init__(self, timesteps: Tensor, noise: BlockNoise) -> None:
        self.timesteps = timesteps
        self.noise = noise
        self.remembered: dict[int, Any] = {}

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """See `StepRule`."""
        clean = x0_from_flow(noisy, flow, self.timesteps[level])
        if last:
            return clean
        return add_noise(clean, self.noise(block, level + 1), self.timesteps[level + 1])

    def state_dict(self) -> dict[int, Any]:
        """See `StepRule`: nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[int, Any], device: torch.device) -> None:
        """See `StepRule`."""


class OdeStep:
    """Models that are not distilled: one solver of diffusers per block in flight.

    Multi-step solvers carry history, so a block's solver lives from its first level to its last. It
    looks its steps up among timesteps on the CPU, wherever latents are: nothing waits for a GPU.
    """

    def __init__(self, template: Any) -> None:
        """`template`: a diffusers scheduler whose timesteps are set."""
        self._template = template
        self.remembered: dict[int, Any] = {}
        self.timesteps = template.timesteps.to(torch.float32)

    @classmethod
    def with_steps(cls, sampler: Sampler, num_steps: int, shift: float) -> "OdeStep":
        """A named solver; `num_steps` even steps from 1000 to 0, spread by the timestep shift."""
        if sampler == "euler":  # diffusers' own spacing shifts its last step twice
            even = torch.linspace(NUM_TIMESTEPS, 0, num_steps + 1)[:-1]
            return cls.at(shift_timesteps(even, shift))
        scheduler = make_scheduler(sampler, shift)
        scheduler.set_timesteps(num_steps, device="cpu")
        return cls(scheduler)

    @classmethod
    def at(cls, timesteps: Tensor) -> "OdeStep":
        """Euler steps between given timesteps `[T]`, and from the last one to 0."""
        scheduler = make_scheduler("euler", shift=1.0)
        scheduler.set_timesteps(sigmas=(timesteps / NUM_TIMESTEPS).tolist(), device="cpu")
        return cls(scheduler)

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """See `StepRule`."""
        solver = _copied_solver(self._template if level == 0 else self.remembered[block])
        moved = solver.step(flow, solver.timesteps[level], noisy).prev_sample
        self.remembered[block] = solver
        if last:
            del self.remembered[block]
        return moved

    def state_dict(self) -> dict[int, Any]:
        """See `StepRule`: what each solver has that a new one has not, its history."""
        new = vars(self._template)
        return {
            block: {
                name: _copied(value)
                for name, value in vars(solver).items()
                if name not in new or value is not new[name]
            }
            for block, solver in self.remembered.items()
        }

    def load_state_dict(self, state: Mapping[int, Any], device: torch.device) -> None:
        """See `StepRule`."""
        self.remembered = {block: _copied_solver(self._template) for block in state}
        for block, history in state.items():
            values = {name: _copied(value, device) for name, value in history.items()}
            vars(self.remembered[block]).update(values)


def _copied_solver(solver: Any) -> Any:
    """A solver that stands where another one does; they share what no step changes."""
    own = copy.copy(solver)
    lists = {name: list(v) for name, v in vars(own).items() if isinstance(v, list)}
    vars(own).update(lists)
    return own


def _copied(value: Any, device: torch.device | None = None) -> Any:
    """A copy of a tensor (on `device`), of a list of such, or a plain value."""
    if isinstance(value, list):
        return [_copied(item, device) for item in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


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
