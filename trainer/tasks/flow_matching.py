"""The task of `model/flow_matching.py`."""

from dataclasses import replace

from torch import Tensor

from model.flow_matching import flow_matching_loss
from model.result import LossResult
from pipeline.setup import Setup
from trainer.data import check_latents
from trainer.networks import make_player
from trainer.tasks.base import Batch, GeneratorTask, TaskInputs
from trainer.tasks.windows import WindowForcing
from utils.config import Config
from utils.datasets import Dataset
from utils.devices import to_device
from utils.draws import Draws, Purpose
from utils.errors import UserError
from wan.context import AttentionContext
from wan.flow import shift_timesteps


class FlowMatching(GeneratorTask):
    """Flow matching of a bidirectional (`schedule: full`) or block-causal network."""

    def __init__(self, given: TaskInputs) -> None:
        config = given.config
        super().__init__(given)
        self.forced = config.teacher_forcing or config.window_forcing
        if self.forced and config.schedule == "full":
            raise UserError(
                "teacher and window forcing are for a block-causal network, not schedule=full"
            )
        if config.window_forcing and config.denoising_step_list is None:
            raise UserError("window_forcing needs a denoising_step_list in the config")
        self.players = {"generator": make_player(config, "generator", self.generator, ema=True)}
        self.context = None  # full attention
        if config.schedule != "full" and not config.window_forcing:
            self.context = self._parallel_context(teacher_forcing=config.teacher_forcing)
        self.windows = None
        if config.window_forcing:
            sizes, device = self.generator.config, given.world.device
            self.windows = WindowForcing(config, self.setup, sizes, device, self.frames)

    @classmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`."""
        check_latents(config, setup, data)

    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        config, device = self.config, self.world.device
        latents = self._latents(batch)
        frames = latents.shape[1]
        kept = draws.uniform(Purpose.PROMPT_DROPOUT) >= config.prompt_dropout
        prompts = [p if k else "" for p, k in zip(batch["prompt"], kept.tolist(), strict=True)]
        clean, clean_timesteps = self._clean(batch, latents, draws) if self.forced else (None, None)
        timesteps, context = self._levels(draws, frames)
        embeddings = self._embedded(prompts)
        with self.timer.phase("forward"):
            return flow_matching_loss(
                self.generator,
                latents,
                to_device(draws.normal(Purpose.NOISE, latents.shape[1:]), device),
                to_device(timesteps, device),
                self.generator.encode_text(embeddings),
                shift=config.generator_shift if config.weighting_scheme == "bell" else None,
                context=context,
                clean=clean,
                clean_timesteps=clean_timesteps,
            )

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`."""
        return super().heldout_loss(batch, self._heldout_draws(draws), size)

    def _heldout_draws(self, draws: Draws) -> Draws:
        """With window forcing every item has a rollout of its own."""
        if not self.config.window_forcing:
            return draws
        (number,) = draws.indices
        return replace(draws, update=draws.update + number)

    def phase_flops(self, player: str, draws: Draws) -> dict[str, int]:
        """See `Task`."""
        forward, attention = self._forward_flops(draws)
        return {"forward": forward, "backward": self._backward_flops(forward, attention)}

    def _forward_flops(self, draws: Draws) -> tuple[int, int]:
        """Of one video, and of its attention."""
        if self.windows is not None:
            return self.windows.flops(draws)
        frames = self.frames * (2 if self.config.teacher_forcing else 1)
        return self._clip_flops(self.generator.config, frames)

    def _levels(self, draws: Draws, frames: int) -> tuple[Tensor, AttentionContext | None]:
        """Timesteps `[B, F]` and attention of a batch."""
        if self.windows is not None:
            return self.windows.timesteps(draws)
        return self._timesteps(draws, frames), self.context

    def _timesteps(self, draws: Draws, frames: int) -> Tensor:
        """One timestep per video, or per block with `diffusion_forcing`: `[B, F]`."""
        if not self.config.diffusion_forcing:
            uniform = draws.uniform(Purpose.TIMESTEP)[:, None].expand(-1, frames)
        else:
            uniform = self._per_block(draws.uniform(Purpose.TIMESTEP, (frames,)))
        return shift_timesteps(1000 * (1 - uniform), self.config.generator_shift)
