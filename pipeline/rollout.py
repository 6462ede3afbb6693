"""The one rollout engine: a schedule run from noise to latents, window by window.

Inference, self-rollouts in training, prompt changes and continuation are callers of `Rollout.step`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.sampling import BlockNoise, StepRule
from pipeline.schedule import BlockLayout, Schedule, Window
from wan.context import AttentionContext, CachedContext
from wan.dit import TextContext, WanDiT
from wan.flow import add_noise, x0_from_flow
from wan.kv_cache import ContextPolicy, KVCache

ContextWrapper = Callable[[CachedContext, Window | None], AttentionContext]
"""Puts another context around that of a pass: of a window, or (None) of a clean pass."""


@dataclass(frozen=True)
class WindowResult:
    """What one window pass gave.

    `x0`: the prediction for every frame of the window `[B, q, C, H, W]`.
    `finished`: clean latents `[B, f, C, H, W]` of the blocks that left the window, by block.
    """

    window: Window
    x0: Tensor
    finished: dict[int, Tensor]


class Rollout:
    """Runs a schedule under a context policy; yields one `WindowResult` per `step`.

    A finished block is handed out before its clean pass runs: the clean pass waits until a later
    window is about to read it, so one that nobody reads is never run. Window passes only read the
    cache. `text` may be replaced between steps, and so may `wrap_context`, through which every
    pass's attention goes where it is set.
    """

    def __init__(
        self,
        dit: WanDiT,
        *,
        schedule: Schedule,
        layout: BlockLayout,
        policy: ContextPolicy,
        cache: KVCache,
        grid: tuple[int, int],
        rule: StepRule,
        noise: BlockNoise,
        text: TextContext,
        guidance_scale: float | None = None,
        context_noise: float = 0.0,
        prefix: Sequence[Tensor] = (),
    ) -> None:
        """`prefix`: clean latents of the blocks before `schedule.first_block`.

        With `guidance_scale` g the text (and the cache) hold the conditional rows first, then the
        unconditional ones, and v = v_uncond + g (v_cond - v_uncond).
        """
        self.dit = dit
        self.schedule = schedule
        self.layout = layout
        self.policy = policy
        self.cache = cache
        self.grid = grid
        self.rule = rule
        self.noise = noise
        self.text = text
        self.guidance_scale = guidance_scale
        self.context_noise = context_noise
        self.wrap_context: ContextWrapper | None = None
        self.index = 0
        self._in_flight: dict[int, Tensor] = {}
        self._unwritten: dict[int, Tensor] = dict(enumerate(prefix))

    def step(self, *, grad: bool = False) -> WindowResult | None:
        """Run the next window (with gradient if `grad`); None when the schedule has ended."""
        window = self.schedule.window(self.index)
        if window is None:
            return None
        self._run_clean_passes()
        noisy = [self._input(block, level) for block, level in window]  # [B, f, C, H, W] each
        timesteps = [
            self.rule.timesteps[level].expand(x.shape[1])
            for x, (_, level) in zip(noisy, window, strict=True)
        ]
        joined = torch.cat(noisy, dim=1)  # [B, q, C, H, W]
        per_frame = torch.cat(timesteps).to(joined.device).expand(joined.shape[:2])  # [B, q]
        with torch.set_grad_enabled(grad):
            flow = self._velocity(joined, per_frame, window)
            x0 = x0_from_flow(joined, flow, per_frame)
        finished = self._advance(window, noisy, flow.detach())
        self.index += 1
        return WindowResult(window, x0, finished)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but the text and the noise."""
        return {
            "index": self.index,
            "in_flight": {block: x.clone() for block, x in self._in_flight.items()},
            "unwritten": {block: x.clone() for block, x in self._unwritten.items()},
            "timesteps": self.rule.timesteps.tolist(),
            "rule": self.rule.state_dict(),
            "cache": self.cache.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another rollout of the same sizes stood."""
        device = self.cache.device
        if state["timesteps"] != self.rule.timesteps.tolist():
            raise ValueError(
                f"this state was made with levels {state['timesteps']}, "
                f"not {self.rule.timesteps.tolist()}"
            )
        self.cache.load_state_dict(state["cache"])
        self.rule.load_state_dict(state["rule"], device)
        self.index = state["index"]
        self._in_flight = {block: x.to(device) for block, x in state["in_flight"].items()}
        self._unwritten = {block: x.to(device) for block, x in state["unwritten"].items()}

    def _input(self, block: int, level: int) -> Tensor:
        return self.noise(block, 0) if level == 0 else self._in_flight[block]

    def _advance(self, window: Window, noisy: Sequence[Tensor], flow: Tensor) -> dict[int, Tensor]:
        finishing = self.schedule.finishes(window)
        flows = flow.split([x.shape[1] for x in noisy], dim=1)
        finished = {}
        for (block, level), x, v in zip(window, noisy, flows, strict=True):
            last = block in finishing
            moved = self.rule.advance(block, level, x, v, last=last)
            if last:
                self._in_flight.pop(block, None)
                finished[block] = moved
            else:
                self._in_flight[block] = moved
        self._unwritten.update(finished)
        return finished

    @torch.no_grad()
    def _run_clean_passes(self) -> None:
        for block, clean in sorted(self._unwritten.items()):
            frames = clean.shape[1]
            timesteps = torch.full(clean.shape[:2], float(self.context_noise), device=clean.device)
            context = clean
            if self.context_noise > 0:
                noise = self.noise(block, len(self.rule.timesteps))
                context = add_noise(clean, noise, timesteps)
            if self.policy.reads(self.cache.finished, frames):
                self._velocity(context, timesteps)
            self.cache.commit(self._rows(clean))
            del self._unwritten[block]

    def _velocity(self, latents: Tensor, timesteps: Tensor, window: Window | None = None) -> Tensor:
        """The generator's one call: `[B, q, C, H, W] -> [B, q, C, H, W]`; no window: clean pass."""
        clean_pass = window is None
        view = self.policy.view(self.cache.finished, latents.shape[1], clean_pass=clean_pass)
        context: AttentionContext
        context = cached = CachedContext(
            self.cache,
            view,
            self.grid,
            self.dit.config.head_dim,
            write=clean_pass,
            backend=self.dit.attention_backend,
        )
        if self.wrap_context is not None:
            context = self.wrap_context(cached, window)
        flow = self.dit(self._rows(latents), self._rows(timesteps), self.text, context)
        if self.guidance_scale is None:
            return flow
        cond, uncond = flow.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def _rows(self, x: Tensor) -> Tensor:
        """The network's batch: the rollout's rows, twice where there is guidance."""
        return x if self.guidance_scale is None else torch.cat([x, x])
