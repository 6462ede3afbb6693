"""The task of `model/consistency.py`."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from model.consistency import consistency_grid, consistency_loss, flow_map_error
from model.result import LossResult
from trainer.networks import build_causal_teacher, build_generator
from trainer.sharding import overwrite
from trainer.tasks.base import Batch, TaskInputs
from trainer.tasks.flow_matching import FlowMatching
from utils.config import Config
from utils.draws import Draws, Purpose
from utils.errors import UserError
from wan.context import AttentionContext
from wan.flops import training_flops


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
        self._follow()
        given = self._given(batch, draws)
        places = given.pop("places")
        with torch.no_grad():
            target_text = self.target.encode_text(given.pop("cond"))
        return consistency_loss(
            self.generator,
            self.target,
            self.teacher,
            timesteps=self.grid[places].to(self.world.device),
            following=self.grid[places + 1].to(self.world.device),
            target_text=target_text,
            **given,
        )

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`: how far the student is from the teacher's ODE; see `flow_map_error`."""
        given = self._given(batch, self._heldout_draws(draws))
        del given["cond"]
        return flow_map_error(self.generator, self.teacher, grid=self.grid, **given)

    def _given(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        """What the loss and the held-out one are of."""
        latents, cond = self._latents(batch), self.text(batch["prompt"])
        clean, clean_timesteps = self._clean(latents, draws)
        places, context = self._places(draws, latents.shape[1])
        unguided = [self.config.negative_prompt] * (len(cond) if self.config.guidance_scale else 0)
        both = self.text([*batch["prompt"], *unguided])
        with torch.no_grad():
            teacher_text = self.teacher.encode_text(both)
        return {
            "latents": latents,
            "noise": draws.normal(Purpose.NOISE, latents.shape[1:]).to(latents.device),
            "places": places,
            "cond": cond,
            "student_text": self.generator.encode_text(cond),
            "teacher_text": teacher_text,
            "guidance_scale": self.config.guidance_scale,
            "context": context,
            "clean": clean,
            "clean_timesteps": clean_timesteps,
        }

    def flops(self, player: str, draws: Draws) -> int:
        """See `Task`."""
        forward = self._forward_flops(draws)
        teacher = 2 if self.config.guidance_scale else 1
        trained = training_flops(forward, checkpointing=self.config.gradient_checkpointing)
        return trained + (1 + teacher) * forward

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
        if self.config.window_forcing:
            own, context = self._windows(draws)
            offset = draws.integers(Purpose.TIMESTEP, steps // levels)
            return own * (steps // levels) + offset[:, None], context
        assert self.context is not None, "teacher forcing has a mask"
        if not self.config.diffusion_forcing:
            places = draws.integers(Purpose.TIMESTEP, steps)[:, None].expand(-1, frames)
        else:
            places = self._per_block(draws.integers(Purpose.TIMESTEP, steps, (frames,)))
        return places, self.context
