"""The task of `model/flow_matching.py`."""

from dataclasses import replace

import torch
from torch import Tensor

from model.flow_matching import flow_matching_loss
from model.result import LossResult
from model.self_rollout import output_windows
from pipeline.setup import Setup
from trainer.data import check_latents
from trainer.networks import make_player
from trainer.tasks.base import Batch, GeneratorTask, TaskInputs, rollout_recipe
from utils.config import Config
from utils.datasets import Dataset
from utils.devices import to_device
from utils.draws import Draws, Purpose
from utils.errors import UserError
from wan.context import AttentionContext, ForcedContext
from wan.flops import pass_attention_flops, pass_flops
from wan.flow import add_noise, shift_timesteps


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
        if config.window_forcing:
            if config.denoising_step_list is None:
                raise UserError("window_forcing needs a denoising_step_list in the config")
            self.layout.require_full_blocks(self.frames)
        self.players = {"generator": make_player(config, "generator", self.generator, ema=True)}
        self.context = None  # full attention
        if config.schedule != "full" and not config.window_forcing:
            self.context = self._parallel_context(teacher_forcing=config.teacher_forcing)
        self.windowed: dict[tuple[range, ...], ForcedContext] = {}

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
        clean, clean_timesteps = self._clean(latents, draws) if self.forced else (None, None)
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
        sizes, tokens = self.generator.config, self.shape.tokens_per_frame
        if self.config.window_forcing:
            views = self._windows(draws)[1].views
            passes = [pass_flops(sizes, view, tokens) for view in views]
            attention = [pass_attention_flops(sizes, view, tokens) for view in views]
            return sum(passes), sum(attention)
        return self._clip_flops(sizes, self.frames * (2 if self.config.teacher_forcing else 1))

    def _clean(self, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The frames that the noisy ones look back at, and their timesteps `[B, F]`."""
        noise = to_device(draws.normal(Purpose.CLEAN_NOISE, latents.shape[1:]), latents.device)
        level = draws.uniform(Purpose.CLEAN_TIMESTEP) * self.config.clean_context_noise
        timesteps = to_device(level, latents.device)[:, None].expand(-1, latents.shape[1])
        return add_noise(latents, noise, timesteps), timesteps

    def _levels(self, draws: Draws, frames: int) -> tuple[Tensor, AttentionContext | None]:
        """Timesteps `[B, F]` and attention of a batch."""
        if self.config.window_forcing:
            levels, context = self._windows(draws)
            return self.setup.levels.tensor()[levels].expand(len(draws.indices), -1), context
        return self._timesteps(draws, frames), self.context

    def _windows(self, draws: Draws) -> tuple[Tensor, ForcedContext]:
        """Levels `[F]` and attention of the output windows of one rollout, drawn as in DMD."""
        layout = self.layout
        recipe = rollout_recipe(self.config)
        recipe = replace(recipe, longest=self.frames, seed=draws.seed, true_prefix_probability=0.0)
        drawn = recipe.draw(layout, draws.update)
        windows = output_windows(self.setup, drawn)
        blocks = [pair for window in windows for pair in window]
        per_frame = [level for block, level in blocks for _ in range(layout.frames(block))]
        spans = tuple(
            range(layout.start(window.blocks[0]), layout.start(window.blocks[-1] + 1))
            for window in windows
        )
        if spans not in self.windowed:
            self.windowed[spans] = ForcedContext(
                self.setup.policy,
                [range(layout.start(b), layout.start(b + 1)) for b in range(drawn.num_blocks)],
                spans,
                self.shape.grid,
                self.generator.config.head_dim,
                self.world.device,
            )
        return torch.tensor(per_frame), self.windowed[spans]

    def _timesteps(self, draws: Draws, frames: int) -> Tensor:
        """One timestep per video, or per block with `diffusion_forcing`: `[B, F]`."""
        if not self.config.diffusion_forcing:
            uniform = draws.uniform(Purpose.TIMESTEP)[:, None].expand(-1, frames)
        else:
            uniform = self._per_block(draws.uniform(Purpose.TIMESTEP, (frames,)))
        return shift_timesteps(1000 * (1 - uniform), self.config.generator_shift)
