"""The task of `model/dmd.py`."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.dmd import critic_loss, generator_loss, predict_scores, raw_timesteps, score_timesteps
from model.flow_matching import flow_matching_loss
from model.result import LossResult
from model.self_rollout import (
    BatchDraw,
    RolloutDraw,
    rollout_flops,
    scored_clip,
    self_rollout,
)
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from trainer.data import check_latents
from trainer.metrics import TimestepBuckets, latent_statistics
from trainer.networks import build_score, make_player
from trainer.tasks.base import Batch, GeneratorTask, TaskInputs, rollout_recipe
from trainer.tasks.windows import WindowForcing
from utils.config import Config
from utils.datasets import Dataset
from utils.devices import to_device
from utils.draws import ATTEMPT, Draws, Purpose, TrainingNoise
from utils.errors import UserError
from wan.flow import add_noise, shift_timesteps


@dataclass(frozen=True)
class Clip:
    """A rollout: `latents` `[B, F, C, h, w]`, and which frames count `[F]` (None: all).

    `cond`: the embeddings `[B, L, dim]` of its prompts. The first `true_frames` are of a true clip.
    """

    latents: Tensor
    counts: Tensor | None
    drawn: BatchDraw
    cond: Tensor
    true_frames: int


def reads_clips(config: Config) -> bool:
    """Whether a distillation needs true clips, not their prompts alone."""
    return config.motion_guard_weight > 0 or config.true_prefix_probability > 0


class Distillation(GeneratorTask):
    """DMD on self-rollouts: every step updates the critic, every n-th first the generator.

    The generator may stand still for the first steps (`critic_warmup_steps`).
    """

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
        self.guarded = None
        if config.motion_guard_weight and config.motion_guard_attention == "windows":
            sizes, device = self.generator.config, world.device
            self.guarded = WindowForcing(config, setup, sizes, device, self.frames)
        self.errors = TimestepBuckets()
        self.clips: dict[tuple[int, ...], Clip] = {}
        """Rollouts that serve several critic updates, by their update and their videos."""
        self.counted: dict[tuple[BatchDraw, bool], int] = {}
        """Operations of a video's rollout, by what was drawn and whether there is a graph."""

    @classmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`: of any data it reads the prompts."""

    @classmethod
    def check_data(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`: some options also read the clips that are trained on."""
        rollout_recipe(config).blocks(setup.layout)
        super().check_data(config, setup, data)
        if reads_clips(config):
            check_latents(config, setup, data)

    @property
    def warmup_steps(self) -> int:
        """See `Task`."""
        return self.config.critic_warmup_steps

    def due(self, step: int) -> Sequence[str]:
        """See `Task`."""
        if step >= self.warmup_steps and self._turn(step) == 0:
            return ("generator", "critic")
        return ("critic",)

    def _turn(self, step: int) -> int:
        """Place of a step in its turn, which the generator's update begins once it takes part."""
        since = step - self.warmup_steps if step >= self.warmup_steps else step
        return since % self.config.dfake_gen_update_ratio

    def keeps_batch(self, player: str, step: int) -> bool:
        """See `Task`."""
        return player == "critic" and self._use(step + 1) > 0

    def _use(self, step: int) -> int:
        """How many critic updates of earlier steps were on the same rollouts.

        A rollout serves until the student moves, so it can be made anew after a restart.
        """
        return self._turn(step) % self.config.critic_updates_per_rollout

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
        return self._critic_loss(self._shared_clip(batch, draws), draws)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`: on rollouts of its own, all from noise, so that runs compare."""
        clip = self._rollout(self._embedded(batch["prompt"]), draws, grad=False)
        return self._critic_loss(clip, draws)

    def _first_use(self, draws: Draws) -> Draws:
        """The draws of the critic's update for which its rollouts were made.

        An update that is tried again has rollouts of its own.
        """
        if draws.update >= ATTEMPT:
            return draws
        names = list(self.players)
        earlier = self._use(draws.update // len(names))
        return replace(draws, update=draws.update - earlier * len(names))

    def kind(self, draws: Draws) -> str:
        """See `Task`."""
        return self._drawn(draws).shared.schedule

    def phase_flops(self, player: str, draws: Draws) -> dict[str, int]:
        """See `Task`."""
        fake, attention = self._clip_flops(self.fake_score.config, self.frames)
        if player == "critic":
            made = self._rollout_flops(draws, grad=False) if self._first_use(draws) == draws else 0
            backward = self._backward_flops(fake, attention)
            return {"rollout": made, "scores": fake, "backward": backward}
        rollout, whole = (self._rollout_flops(draws, grad=grad) for grad in (False, True))
        scores = fake + 2 * self._clip_flops(self.real_score.config, self.frames)[0]
        phases = {"rollout": rollout, "scores": scores, "backward": whole - rollout}
        if not self.config.motion_guard_weight:
            return phases
        if self.guarded is not None:
            guard, attention = self.guarded.flops(draws)
        else:
            guard, attention = self._clip_flops(self.generator.config, self.frames)
        phases["backward"] += self._backward_flops(guard, attention)
        return {"guard": guard, **phases}

    def _rollout_flops(self, draws: Draws, *, grad: bool) -> int:
        """Operations of a video's rollout, with its backward passes if `grad`; of this rank."""
        split, rank = self.batch_split, self.world.ranks.rank
        own = (draws.for_indices(split.indices_or_one(m, rank)) for m in range(split.accumulation))
        batches = [self._drawn(each) for each in own]
        for drawn in {*batches} - {drawn for drawn, of in self.counted if of == grad}:
            self.counted[drawn, grad] = rollout_flops(
                self.setup,
                self.generator.config,
                drawn,
                scored_frames=self.frames,
                grad=grad,
                checkpointing=self.config.gradient_checkpointing,
                selective=self.config.selective_checkpointing,
                replayed=self.config.replayed_backward,
            )
        return sum(self.counted[drawn, grad] for drawn in batches) // len(batches)

    def _needs_vae(self) -> bool:
        longest = rollout_recipe(self.config).longest_frames(self.layout)
        reencodes = self.config.reencode_first_frame and longest > self.frames
        return reencodes or (reads_clips(self.config) and super()._needs_vae())

    def _drawn(self, draws: Draws) -> BatchDraw:
        """The rollouts of a batch."""
        return rollout_recipe(self.config).draw_batch(
            self.layout, draws.update, draws.indices, alone=self.world.size == 1
        )

    def _prefix(self, batch: Batch, draws: Draws) -> Tensor | None:
        """Latents of the true frames that the rollouts go on from `[B, n, C, h, w]`; None: none."""
        frames = self.layout.start(self._drawn(draws).shared.given_blocks)
        return self._latents(batch, frames) if frames else None

    def _rollout(
        self, cond: Tensor, draws: Draws, *, grad: bool, prefix: Tensor | None = None
    ) -> Clip:
        source = TrainingNoise(
            draws.seed,
            draws.update,
            self.shape.latent,
            self.layout.block_frames,
            self.layout.frames(0),
        )
        noise = BlockNoise(source, draws.indices, self.world.device)
        drawn = self._drawn(draws)
        drawn = drawn.from_noise if prefix is None else drawn
        given_frames = 0 if prefix is None else prefix.shape[1]
        # With gradient it is the student that is trained, and gathered for the whole update.
        whole = nullcontext() if grad else self.players["generator"].gathered()
        with self.timer.phase("rollout"), torch.set_grad_enabled(grad), whole:
            text = self.generator.encode_text(cond)
            latents = self_rollout(
                self.setup,
                self.generator,
                text,
                noise,
                drawn,
                scored_frames=self.frames,
                grad=grad,
                replayed=self.config.replayed_backward,
                prefix=prefix,
                before_window=self.look,
            )
            vae = self.vae if self.config.reencode_first_frame else None
            with self.timer.phase("reencode") if vae else nullcontext():
                clip, counts = scored_clip(
                    latents,
                    vae,
                    scored=self.frames,
                    block_frames=self.layout.frames(0),
                    given_frames=given_frames,
                )
        true_frames = max(0, given_frames - (latents.shape[1] - self.frames))
        return Clip(clip, counts, drawn, cond, true_frames)

    def _score_inputs(self, clip: Clip, draws: Draws) -> tuple[Tensor, Tensor]:
        """Timesteps `[B, F]` and noise `[B, F, C, h, w]` of the scores."""
        uniform, lowest = draws.uniform(Purpose.SCORE_TIMESTEP), map(self._lowest, clip.drawn.rows)
        shift, count = self.config.timestep_shift, self.config.num_train_timestep
        end = shift_timesteps(torch.tensor(self.config.max_score_timestep), 1 / shift).item()
        raw = raw_timesteps(uniform, list(lowest), count, end=end)
        timesteps = score_timesteps(raw, shift)
        shape, on = clip.latents.shape, clip.latents.device
        noise = draws.normal(Purpose.SCORE_NOISE, shape[1:])
        return to_device(timesteps, on)[:, None].expand(-1, shape[1]), to_device(noise, on)

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
        cond = self._embedded(batch["prompt"])
        both = self._with_negative(cond)
        # What is made first is differentiated last: a replay finds no other pass under way.
        guard = self._guard(batch, cond, draws) if self.config.motion_guard_weight else None
        clip = self._rollout(cond, draws, grad=True, prefix=self._prefix(batch, draws))
        timesteps, noise = self._score_inputs(clip, draws)
        samples, drawn = clip.latents.detach(), clip.drawn.shared
        self.look()
        with self.timer.phase("scores"), torch.no_grad():
            scores = predict_scores(
                self.real_score,
                self.fake_score,
                add_noise(samples, noise, timesteps),
                timesteps,
                real_text=self.real_score.encode_text(both),
                fake_text=self.fake_score.encode_text(cond),
                guidance_scale=self.config.guidance_scale,
            )
        result = generator_loss(clip.latents, scores, clip.counts)
        statistics = latent_statistics(samples[:, clip.true_frames :])
        shares = {"rolling": float(drawn.schedule == "rolling"), "blocks": drawn.end}
        if self.config.true_prefix_probability:
            shares["given_blocks"] = drawn.given_blocks
        metrics = {
            **result.metrics,
            **{f"generated/{name}": value for name, value in statistics.items()},
            **{f"rollout/{name}": torch.tensor(float(v)) for name, v in shares.items()},
        }
        if guard is None:
            return LossResult(result.loss, metrics)
        metrics["guard/error"] = guard.detach()
        return LossResult(result.loss + self.config.motion_guard_weight * guard, metrics)

    def _guard(self, batch: Batch, embeddings: Tensor, draws: Draws) -> Tensor:
        """The student's error on true clips, at its own levels.

        HiAR (arXiv 2603.08703): a forward KL, which covers all motion there is, beside the reverse
        one of DMD, all frames at one level and in full attention, which rollouts do not use.
        `motion_guard_attention: windows` (our own) takes the windows, levels and attention of
        rollouts, so that it also guards what a student copies from the frames behind a window.
        """
        latents, device = self._latents(batch), self.world.device
        context, clean, clean_timesteps = None, None, None
        if self.guarded is not None:
            timesteps, context = self.guarded.timesteps(draws)
            clean, clean_timesteps = self._clean(batch, latents, draws)
        else:
            levels = self.setup.levels.tensor()
            drawn = draws.integers(Purpose.GUARD_LEVEL, len(levels))
            timesteps = levels[drawn][:, None].expand(-1, latents.shape[1])
        with self.timer.phase("guard"):
            return flow_matching_loss(
                self.generator,
                latents,
                to_device(draws.normal(Purpose.GUARD_NOISE, latents.shape[1:]), device),
                to_device(timesteps, device),
                self.generator.encode_text(embeddings),
                shift=None,
                context=context,
                clean=clean,
                clean_timesteps=clean_timesteps,
            ).loss

    def _shared_clip(self, batch: Batch, draws: Draws) -> Clip:
        """The rollouts of a critic's update, which may have served an earlier one."""
        first = self._first_use(draws)
        key = (first.update, *draws.indices)
        self.clips = {made: clip for made, clip in self.clips.items() if made[0] == first.update}
        if key in self.clips:
            return self.clips[key]
        cond, prefix = self._embedded(batch["prompt"]), self._prefix(batch, first)
        clip = self._rollout(cond, first, grad=False, prefix=prefix)
        if self.config.critic_updates_per_rollout > 1:
            self.clips[key] = clip
        return clip

    def _critic_loss(self, clip: Clip, draws: Draws) -> LossResult:
        timesteps, noise = self._score_inputs(clip, draws)
        self.look()
        with self.timer.phase("scores"):
            text = self.fake_score.encode_text(clip.cond)
            return critic_loss(self.fake_score, clip.latents, noise, timesteps, text)
