"""The task of `model/dmd.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.dmd import critic_loss, generator_loss, predict_scores, raw_timesteps, score_timesteps
from model.result import LossResult
from model.self_rollout import (
    RolloutDraw,
    rollout_flops,
    scored_clip,
    self_rollout,
)
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from trainer.metrics import TimestepBuckets, latent_statistics
from trainer.networks import build_score, make_player
from trainer.tasks.base import Batch, GeneratorTask, TaskInputs, rollout_recipe
from utils.config import Config
from utils.datasets import Dataset
from utils.draws import Draws, Purpose, TrainingNoise
from utils.errors import UserError
from wan.flops import forward_flops, training_flops
from wan.flow import add_noise, shift_timesteps


class Distillation(GeneratorTask):
    """DMD on self-rollouts: every step updates the critic, every n-th first the generator."""

    roles = ("generator", "real_score", "fake_score")

    def __init__(self, given: TaskInputs) -> None:
        config, setup, world = given.config, given.setup, given.world
        if config.denoising_step_list is None:
            raise UserError("distillation needs a denoising_step_list in the config")
        super().__init__(given)
        self.real_score = build_score(config, setup, world, "real_score", trained=False).eval()
        self.fake_score = build_score(config, setup, world, "fake_score", trained=True)
        self.players = {
            "generator": make_player(config, "generator", self.generator, ema=True),
            "critic": make_player(config, "critic", self.fake_score, critic=True),
        }
        self.errors = TimestepBuckets()

    @classmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`: of any data it reads the prompts."""

    def due(self, step: int) -> Sequence[str]:
        """See `Task`."""
        if step % self.config.dfake_gen_update_ratio == 0:
            return ("generator", "critic")
        return ("critic",)

    def collect(self, metrics: Mapping[str, Tensor]) -> None:
        """See `Task`: the critic's error at each timestep."""
        if "critic/errors" in metrics:
            self.errors.add(metrics["critic/timesteps"], metrics["critic/errors"])

    def state_dict(self) -> dict[str, Any]:
        """See `Task`."""
        return {"errors": self.errors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Task`."""
        self.errors.load_state_dict(state.get("errors"))

    def derive(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: how far the critic is ahead of the teacher, and where it errs."""
        derived: dict[str, Any] = {"critic/by_timestep": self.errors.read()}
        if "teacher/error" in metrics:
            derived["critic/ratio"] = metrics["critic/error"] / metrics["teacher/error"]
        return derived

    @property
    def heldout_player(self) -> str:
        """The critic: the value of the generator's loss is no measure (see `generator_loss`)."""
        return "critic"

    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        if player == "generator":
            return self._generator_loss(batch, draws)
        return self._critic_loss(batch, draws)

    def flops(self, player: str, draws: Draws) -> int:
        """See `Task`."""
        grad, config = player == "generator", self.config
        drawn = rollout_recipe(config).draw(self.layout, draws.update)
        frames, tokens = self.frames, self.shape.tokens_per_frame
        rollout = rollout_flops(
            self.setup,
            self.generator.config,
            drawn,
            scored_frames=frames,
            grad=grad,
            checkpointing=config.gradient_checkpointing,
        )
        fake = forward_flops(self.fake_score.config, frames, frames, tokens)
        if not grad:
            return rollout + training_flops(fake, checkpointing=config.gradient_checkpointing)
        return rollout + fake + 2 * forward_flops(self.real_score.config, frames, frames, tokens)

    def _needs_vae(self) -> bool:
        longest = rollout_recipe(self.config).longest_frames(self.layout)
        return self.config.reencode_first_frame and longest > self.frames

    def _rollout(
        self, embeddings: Tensor, draws: Draws, *, grad: bool
    ) -> tuple[Tensor, Tensor | None, RolloutDraw]:
        source = TrainingNoise(
            draws.seed,
            draws.update,
            self.shape.latent,
            self.layout.block_frames,
            self.layout.frames(0),
        )
        noise = BlockNoise(source, draws.indices, self.world.device)
        drawn = rollout_recipe(self.config).draw(self.layout, draws.update)
        with self.timer.phase("rollout"), torch.set_grad_enabled(grad):
            text = self.generator.encode_text(embeddings)
            latents = self_rollout(
                self.setup,
                self.generator,
                text,
                noise,
                drawn,
                scored_frames=self.frames,
                grad=grad,
                before_window=self.look,
            )
            clip, counts = scored_clip(
                latents,
                self.vae,
                scored=self.frames,
                block_frames=self.layout.frames(0),
            )
        return clip, counts, drawn

    def _score_inputs(self, clip: Tensor, draws: Draws, lowest: int = 0) -> tuple[Tensor, Tensor]:
        """Timesteps `[B, F]` and noise `[B, F, C, h, w]` of the scores."""
        uniform = draws.uniform(Purpose.SCORE_TIMESTEP)
        raw = raw_timesteps(uniform, lowest, self.config.num_train_timestep)
        timesteps = score_timesteps(raw, self.config.timestep_shift)
        noise = draws.normal(Purpose.SCORE_NOISE, clip.shape[1:])
        on = clip.device
        return timesteps.to(on)[:, None].expand(-1, clip.shape[1]), noise.to(on)

    def _lowest(self, drawn: RolloutDraw) -> int:
        """With `ts_schedule`, scores stay above the next level of a Self Forcing rollout.

        In timesteps before the shift. There is no such level where every block has its own.
        """
        config, following = self.config, drawn.exit_levels[0] + 1
        steps = config.denoising_step_list or []
        shared = drawn.schedule == "block" and config.same_step_across_blocks
        if not config.ts_schedule or not shared or following >= len(steps):
            return 0
        if config.warp_denoising_step:
            return round(steps[following])
        return round(
            shift_timesteps(torch.tensor(steps[following]), 1 / config.generator_shift).item()
        )

    def _generator_loss(self, batch: Batch, draws: Draws) -> LossResult:
        cond = self.text(batch["prompt"])
        both = self.text([*batch["prompt"], *[self.config.negative_prompt] * len(cond)])
        clip, counts, drawn = self._rollout(cond, draws, grad=True)
        timesteps, noise = self._score_inputs(clip, draws, self._lowest(drawn))
        self.look()
        with self.timer.phase("scores"), torch.no_grad():
            scores = predict_scores(
                self.real_score,
                self.fake_score,
                add_noise(clip.detach(), noise, timesteps),
                timesteps,
                real_text=self.real_score.encode_text(both),
                fake_text=self.fake_score.encode_text(cond),
                guidance_scale=self.config.guidance_scale,
            )
        result = generator_loss(clip, scores, counts)
        statistics = latent_statistics(clip.detach())
        shares = {"rolling": float(drawn.schedule == "rolling"), "blocks": drawn.num_blocks}
        metrics = {
            **result.metrics,
            **{f"generated/{name}": value for name, value in statistics.items()},
            **{f"rollout/{name}": torch.tensor(float(v)) for name, v in shares.items()},
        }
        return LossResult(result.loss, metrics)

    def _critic_loss(self, batch: Batch, draws: Draws) -> LossResult:
        cond = self.text(batch["prompt"])
        clip, _, drawn = self._rollout(cond, draws, grad=False)
        timesteps, noise = self._score_inputs(clip, draws, self._lowest(drawn))
        self.look()
        with self.timer.phase("scores"):
            text = self.fake_score.encode_text(cond)
            return critic_loss(self.fake_score, clip, noise, timesteps, text)
