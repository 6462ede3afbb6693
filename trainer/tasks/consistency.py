"""The task of `model/consistency.py`."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from model.consistency import (
    consistency_grid,
    consistency_loss,
    consistency_target,
    flow_map_error,
)
from model.result import LossResult
from trainer.networks import build_causal_teacher, build_generator
from trainer.sharding import overwrite
from trainer.tasks.base import Batch, TaskInputs
from trainer.tasks.flow_matching import FlowMatching
from utils.config import Config
from utils.devices import to_device
from utils.draws import Draws, Purpose
from utils.errors import UserError
from wan.context import AttentionContext


class Consistency(FlowMatching):
    """Consistency distillation of a causal network that `generator_ckpt` holds into a student.

    Teacher, student and target start from it. The target has the student's averaged weights, from
    `ema_start_step` on, and before that its own: they are no state of their own.
    """

    roles: ClassVar[tuple[str, ...]] = ("generator", "real_score", "target")

    def __init__(self, given: TaskInputs) -> None:
        config, setup, world = given.config, given.setup, given.world
        if not (config.teacher_forcing or config.window_forcing):
            raise UserError(
                "consistency trains a student that goes on from clean frames: set "
                "teacher_forcing=true or window_forcing=true"
            )
        if config.denoising_step_list is None:
            raise UserError("consistency needs a denoising_step_list in the config")
        self.grid = consistency_grid(
            setup.levels.tensor(), config.consistency_steps, config.generator_shift
        )
        super().__init__(given)
        self.teacher = build_causal_teacher(config, setup, world)
        self.target = build_generator(config, setup, world).requires_grad_(False).eval()
        self.target_stored = dict(self.target.named_parameters())
        self.followed = 0  # the student's update whose weights the target has

    @classmethod
    def networks(cls, config: Config) -> dict[str, str]:
        """See `Task`: three of one kind."""
        return dict.fromkeys(cls.roles, config.generator_name)

    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        given, places = self._given(batch, draws)
        cond, both = self._texts(batch)
        timesteps = to_device(self.grid[places], self.world.device)
        with self.timer.phase("teacher"), torch.no_grad():
            self._follow()
            end = consistency_target(
                self.target,
                self.teacher,
                timesteps=timesteps,
                following=to_device(self.grid[places + 1], self.world.device),
                target_text=self.target.encode_text(cond),
                teacher_text=self.teacher.encode_text(both),
                guidance_scale=self.config.guidance_scale,
                **given,
            )
        with self.timer.phase("forward"):
            text = self.generator.encode_text(cond)
            return consistency_loss(self.generator, end, timesteps=timesteps, text=text, **given)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`: how far the student is from the teacher's ODE; see `flow_map_error`."""
        given, places = self._given(batch, self._heldout_draws(draws))
        cond, both = self._texts(batch)
        return flow_map_error(
            self.generator,
            self.teacher,
            grid=self.grid,
            places=places,
            student_text=self.generator.encode_text(cond),
            teacher_text=self.teacher.encode_text(both),
            guidance_scale=self.config.guidance_scale,
            look=self.look,
            **given,
        )

    def _texts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompts, and with guidance of as many negative ones behind them."""
        cond = self._embedded(batch["prompt"])
        return cond, self._with_negative(cond) if self._guided else cond

    @property
    def _guided(self) -> bool:
        return self.config.guidance_scale != 0

    def _given(self, batch: Batch, draws: Draws) -> tuple[dict[str, Any], Tensor]:
        """What the loss and the held-out one are of, and the places of its frames."""
        latents = self._latents(batch)
        clean, clean_timesteps = self._clean(batch, latents, draws)
        places, context = self._places(draws, latents.shape[1])
        return {
            "latents": latents,
            "noise": to_device(draws.normal(Purpose.NOISE, latents.shape[1:]), latents.device),
            "context": context,
            "clean": clean,
            "clean_timesteps": clean_timesteps,
        }, places

    def phase_flops(self, player: str, draws: Draws) -> dict[str, int]:
        """See `Task`."""
        phases = super().phase_flops(player, draws)
        return {"teacher": (3 if self._guided else 2) * phases["forward"], **phases}

    def _follow(self) -> None:
        """Give the target the weights that the student's last update has left."""
        player = self.players["generator"]
        if self.followed != player.updates:
            weights = player.trained if player.ema is None else player.ema.shadow
            overwrite(self.target, self.target_stored, weights)
            self.followed = player.updates

    def _places(self, draws: Draws, frames: int) -> tuple[Tensor, AttentionContext]:
        """Of each frame the step of the teacher's grid, `[B, F]`, and the attention of a batch.

        Windows of a rollout stand at any steps between their levels and the next ones.
        """
        steps, levels = self.config.consistency_steps, self.setup.levels.num
        if self.windows is not None:
            own, context = self.windows.draw(draws)
            offset = draws.integers(Purpose.TIMESTEP, steps // levels)
            return own * (steps // levels) + offset[:, None], context
        assert self.context is not None, "teacher forcing has a mask"
        if not self.config.diffusion_forcing:
            places = draws.integers(Purpose.TIMESTEP, steps)[:, None].expand(-1, frames)
        else:
            places = self._per_block(draws.integers(Purpose.TIMESTEP, steps, (frames,)))
        return places, self.context
