"""Tasks: which networks are trained in which order, and how a batch becomes a loss.

The objectives themselves are in `model/`; a task feeds them with networks, text and draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pipeline.components import (
    ModelFiles,
    block_layout,
    context_policy,
    level_timesteps,
    video_shape,
)
from torch import Tensor

from model.dmd import critic_loss, generator_loss, predict_scores, raw_timesteps, score_timesteps
from model.flow_matching import flow_matching_loss
from model.ode_regression import block_levels, ode_regression_loss
from model.result import LossResult
from model.self_rollout import (
    RolloutPlan,
    longest_rollout,
    output_windows,
    plan_rollout,
    rollout_flops,
    scored_clip,
    scored_frames,
    self_rollout,
)
from model.vae import vae_loss
from pipeline.sampling import BlockNoise
from pipeline.text_to_video import VideoPipeline
from shapes.captions import caption_loss
from shapes.world import token_classes, token_labels
from trainer.data import BatchPlan, check_auxiliary_data, check_training_data
from trainer.export import export_generator, export_text_encoder, export_vae
from trainer.metrics import Timer, latent_statistics
from trainer.networks import (
    Player,
    build_caption_reader,
    build_generator,
    build_score,
    build_text,
    build_text_encoder,
    build_trained_vae,
    build_vae,
    make_player,
)
from trainer.sharding import World
from utils.config import Config
from utils.datasets import Dataset
from utils.draws import Draws, Purpose, TrainingNoise
from utils.errors import UserError
from utils.video import to_float
from wan.checkpoints import load_dit_config
from wan.context import AttentionContext, ForcedContext, MaskedContext, frame_mask
from wan.dit import WanDiT
from wan.flops import forward_flops, pass_flops, training_flops
from wan.flow import add_noise, shift_timesteps
from wan.text_encoder import TokenBatch, clean_prompt

Batch = dict[str, Any]


class Task(ABC):
    """Trained networks (`players`), and what one update of each does with a micro-batch."""

    players: dict[str, Player]

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        self.config = config
        self.world = world
        self.plan = plan
        self.timer = timer
        self.data = data
        self.files = ModelFiles.find(config, config.generator_name)
        if config.i2v:
            raise UserError("training starts from noise, not from images: set i2v=false")

    def phases(self, step: int) -> Sequence[str]:
        """Players that are updated in a step, in order."""
        return tuple(self.players)

    @abstractmethod
    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """The loss of a micro-batch for one player."""

    @property
    def heldout_phase(self) -> str:
        """The player whose loss is measured on held-out data."""
        return next(iter(self.players))

    def heldout_size(self, prompts: Sequence[str], draws: Draws) -> float:
        """What the loss counts in an item, on average over the held-out ones: 1 if it is items.

        The regression of ODE pairs counts noisy frames, not equally many in every item.
        """
        return 1.0

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """The loss of a batch of one held-out item; `size` is `heldout_size` of all.

        Such that means over the items are the loss and the metrics of one batch of all of them.
        """
        return self.loss(self.heldout_phase, batch, draws)

    @abstractmethod
    def flops(self, phase: str, draws: Draws) -> int | None:
        """Floating-point operations of one video's share of an update; None: not known."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the weights in the published form; all ranks have to call it."""

    def sampler(self) -> VideoPipeline | None:
        """What makes sample videos of the student as it is, if it can."""
        return None

    def _video(self, batch: Batch) -> Tensor:
        """Video of a batch `[B, F, 3, H, W]` in [-1, 1]."""
        if "video" not in batch:
            raise UserError("the data hold no videos: set data_path to a folder of them")
        return torch.stack([to_float(clip) for clip in batch["video"]]).to(self.world.device)


class GeneratorTask(Task):
    """Tasks that train a transformer as the generator."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        super().__init__(config, world, plan, timer, data)
        self.shape = video_shape(config, load_dit_config(self.files.folder))
        check_training_data(config, data, self.shape.latent)
        self.generator: WanDiT = build_generator(config, world)
        self.layout = block_layout(config)
        self.text = build_text(config, world, self.generator.config.text_len)
        self.vae = build_vae(config, world) if self._needs_vae() else None

    def export(self, folder: Path) -> None:
        """See `Task`."""
        export_generator(folder, self.config, self.players["generator"], is_main=self.world.is_main)

    def sampler(self) -> VideoPipeline:
        """See `Task`."""
        # Not kept as `self.vae`: a VAE there means that the training itself uses one.
        vae = self.vae or build_vae(self.config, self.world)
        return VideoPipeline(self.config, self.generator, files=self.files, vae=vae, text=self.text)

    def _needs_vae(self) -> bool:
        return self.config.load_raw_video

    def _latents(self, batch: Batch) -> Tensor:
        """Clean latents of a batch `[B, F, C, h, w]`, encoded here if the data are videos.

        Of stored latents the first frames, if they are more than the config's.
        """
        if "latents" in batch:
            return batch["latents"][:, : self.config.image_or_video_shape[1]].to(self.world.device)
        assert self.vae is not None, "load_raw_video loads it"
        with self.timer.phase("encode"):
            return self.vae.encode(self._video(batch)).float()

    def _parallel_context(self, *, teacher_forcing: bool = False) -> AttentionContext:
        """Block-causal attention of parallel training."""
        frames = scored_frames(self.config)
        mask = frame_mask(
            frames,
            self.config.num_frame_per_block,
            local_frames=self.config.attention_frames,
            independent_first_frame=self.config.independent_first_frame,
            teacher_forcing=teacher_forcing,
        )
        positions = tuple(range(frames)) * (2 if teacher_forcing else 1)
        head_dim = self.generator.config.head_dim
        return MaskedContext(mask, positions, self.shape.grid, head_dim, self.world.device)


class Distillation(GeneratorTask):
    """DMD on self-rollouts: every step updates the critic, every n-th first the generator."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        if config.denoising_step_list is None:
            raise UserError("distillation needs a denoising_step_list in the config")
        super().__init__(config, world, plan, timer, data)
        self.real_score = build_score(config, world, "real_score", trained=False).eval()
        self.fake_score = build_score(config, world, "fake_score", trained=True)
        self.players = {
            "generator": make_player(config, "generator", self.generator, ema=True),
            "critic": make_player(config, "critic", self.fake_score, critic=True),
        }

    def phases(self, step: int) -> Sequence[str]:
        """See `Task`."""
        if step % self.config.dfake_gen_update_ratio == 0:
            return ("generator", "critic")
        return ("critic",)

    @property
    def heldout_phase(self) -> str:
        """The critic: the value of the generator's loss is no measure (see `generator_loss`)."""
        return "critic"

    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        if phase == "generator":
            return self._generator_loss(batch, draws)
        return self._critic_loss(batch, draws)

    def flops(self, phase: str, draws: Draws) -> int:
        """See `Task`."""
        grad, config = phase == "generator", self.config
        plan = plan_rollout(config, draws.update)
        frames, tokens = scored_frames(config), self.shape.tokens_per_frame
        rollout = rollout_flops(config, self.generator.config, plan, grad=grad)
        fake = forward_flops(self.fake_score.config, frames, frames, tokens)
        if not grad:
            return rollout + training_flops(fake, checkpointing=config.gradient_checkpointing)
        return rollout + fake + 2 * forward_flops(self.real_score.config, frames, frames, tokens)

    def _needs_vae(self) -> bool:
        longer = longest_rollout(self.config) > scored_frames(self.config)
        return self.config.reencode_first_frame and longer

    def _rollout(
        self, embeddings: Tensor, draws: Draws, *, grad: bool
    ) -> tuple[Tensor, Tensor | None, RolloutPlan]:
        config = self.config
        source = TrainingNoise(
            draws.seed,
            draws.update,
            self.shape.latent,
            self.layout.block_frames,
            self.layout.frames(0),
        )
        noise = BlockNoise(source, draws.indices, self.world.device)
        plan = plan_rollout(config, draws.update)
        with self.timer.phase("rollout"), torch.set_grad_enabled(grad):
            text = self.generator.encode_text(embeddings)
            latents = self_rollout(config, self.generator, text, noise, plan, grad=grad)
            clip, counts = scored_clip(
                latents,
                self.vae,
                scored=scored_frames(config),
                block_frames=self.layout.frames(0),
            )
        return clip, counts, plan

    def _score_inputs(self, clip: Tensor, draws: Draws, lowest: int = 0) -> tuple[Tensor, Tensor]:
        """Timesteps `[B, F]` and noise `[B, F, C, h, w]` of the scores."""
        uniform = draws.uniform(Purpose.SCORE_TIMESTEP)
        raw = raw_timesteps(uniform, lowest, self.config.num_train_timestep)
        timesteps = score_timesteps(raw, self.config.timestep_shift)
        noise = draws.normal(Purpose.SCORE_NOISE, clip.shape[1:])
        on = clip.device
        return timesteps.to(on)[:, None].expand(-1, clip.shape[1]), noise.to(on)

    def _lowest(self, plan: RolloutPlan) -> int:
        """With `ts_schedule`, scores stay above the next level of a Self Forcing rollout.

        In timesteps before the shift. There is no such level where every block has its own.
        """
        config, following = self.config, plan.exit_levels[0] + 1
        steps = config.denoising_step_list or []
        shared = plan.schedule == "block" and config.same_step_across_blocks
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
        clip, counts, plan = self._rollout(cond, draws, grad=True)
        timesteps, noise = self._score_inputs(clip, draws, self._lowest(plan))
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
        shares = {"rolling": float(plan.schedule == "rolling"), "blocks": plan.num_blocks}
        metrics = {
            **result.metrics,
            **{f"generated/{name}": value for name, value in statistics.items()},
            **{f"rollout/{name}": torch.tensor(float(v)) for name, v in shares.items()},
        }
        return LossResult(result.loss, metrics)

    def _critic_loss(self, batch: Batch, draws: Draws) -> LossResult:
        cond = self.text(batch["prompt"])
        clip, _, plan = self._rollout(cond, draws, grad=False)
        timesteps, noise = self._score_inputs(clip, draws, self._lowest(plan))
        with self.timer.phase("scores"):
            text = self.fake_score.encode_text(cond)
            return critic_loss(self.fake_score, clip, noise, timesteps, text)


class OdeInitialisation(GeneratorTask):
    """Regression of the block-causal student on the teacher's trajectories."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        if config.denoising_step_list is None:
            raise UserError("ODE initialisation needs a denoising_step_list in the config")
        super().__init__(config, world, plan, timer, data)
        self.players = {"generator": make_player(config, "generator", self.generator, ema=True)}
        self.timesteps = torch.cat([level_timesteps(config), torch.zeros(1)])  # [S]
        self.context = self._parallel_context()

    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        counted = self._noisy_frames(draws.for_indices(range(self.plan.videos)))
        return self._regression(batch, draws, counted / (self.plan.ranks * self.plan.accumulation))

    def heldout_size(self, prompts: Sequence[str], draws: Draws) -> float:
        """See `Task`: noisy frames."""
        return self._noisy_frames(draws) / len(prompts)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`."""
        return self._regression(batch, draws, size)

    def _regression(self, batch: Batch, draws: Draws, frames_in_loss: float) -> LossResult:
        trajectory = batch["trajectory"].to(self.world.device)
        return ode_regression_loss(
            self.generator,
            trajectory,
            self._levels(draws, trajectory.shape[2]).to(self.world.device),
            self.timesteps.to(self.world.device),
            self.generator.encode_text(self.text(batch["prompt"])),
            self.context,
            frames_in_loss=frames_in_loss,
        )

    def flops(self, phase: str, draws: Draws) -> int:
        """See `Task`."""
        frames = scored_frames(self.config)
        forward = forward_flops(self.generator.config, frames, frames, self.shape.tokens_per_frame)
        return training_flops(forward, checkpointing=self.config.gradient_checkpointing)

    def _noisy_frames(self, draws: Draws) -> int:
        """How many frames of these samples are in the loss; at least 1."""
        levels = self._levels(draws, scored_frames(self.config))
        return max(1, int((levels < len(self.timesteps) - 1).sum()))

    def _levels(self, draws: Draws, frames: int) -> Tensor:
        drawn = draws.integers(Purpose.TIMESTEP, len(self.timesteps), (frames,))
        blocks = self.layout.blocks_for(frames)
        return block_levels(drawn, [self.layout.start(block) for block in range(blocks)])


class FlowMatching(GeneratorTask):
    """Flow matching of a bidirectional (`schedule: full`) or block-causal network."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        super().__init__(config, world, plan, timer, data)
        self.forced = config.teacher_forcing or config.window_forcing
        if self.forced and config.schedule == "full":
            raise UserError(
                "teacher and window forcing are for a block-causal network, not schedule=full"
            )
        if config.window_forcing:
            if config.denoising_step_list is None:
                raise UserError("window_forcing needs a denoising_step_list in the config")
            self.layout.require_full_blocks(scored_frames(config))
        self.players = {"generator": make_player(config, "generator", self.generator, ema=True)}
        self.context = None  # full attention
        if config.schedule != "full" and not config.window_forcing:
            self.context = self._parallel_context(teacher_forcing=config.teacher_forcing)
        self.windowed: dict[tuple[range, ...], ForcedContext] = {}

    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        config, device = self.config, self.world.device
        latents = self._latents(batch)
        frames = latents.shape[1]
        kept = draws.uniform(Purpose.PROMPT_DROPOUT) >= config.prompt_dropout
        prompts = [p if k else "" for p, k in zip(batch["prompt"], kept.tolist(), strict=True)]
        clean, clean_timesteps = None, None
        if self.forced:
            noise = draws.normal(Purpose.CLEAN_NOISE, latents.shape[1:]).to(device)
            level = draws.uniform(Purpose.CLEAN_TIMESTEP) * config.clean_context_noise
            clean_timesteps = level[:, None].expand(-1, frames).to(device)
            clean = add_noise(latents, noise, clean_timesteps)
        timesteps, context = self._levels(draws, frames)
        return flow_matching_loss(
            self.generator,
            latents,
            draws.normal(Purpose.NOISE, latents.shape[1:]).to(device),
            timesteps.to(device),
            self.generator.encode_text(self.text(prompts)),
            shift=config.generator_shift if config.weighting_scheme == "bell" else None,
            context=context,
            clean=clean,
            clean_timesteps=clean_timesteps,
        )

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`; with window forcing every item has a rollout of its own."""
        if self.config.window_forcing:
            (number,) = draws.indices
            draws = replace(draws, update=draws.update + number)
        return super().heldout_loss(batch, draws, size)

    def flops(self, phase: str, draws: Draws) -> int:
        """See `Task`."""
        sizes, tokens = self.generator.config, self.shape.tokens_per_frame
        if self.config.window_forcing:
            views = self._windows(draws)[1].views
            forward = sum(pass_flops(sizes, view, tokens) for view in views)
        else:
            frames = scored_frames(self.config) * (2 if self.config.teacher_forcing else 1)
            forward = forward_flops(sizes, frames, frames, tokens)
        return training_flops(forward, checkpointing=self.config.gradient_checkpointing)

    def _levels(self, draws: Draws, frames: int) -> tuple[Tensor, AttentionContext | None]:
        """Timesteps `[B, F]` and attention of a batch."""
        if self.config.window_forcing:
            timesteps, context = self._windows(draws)
            return timesteps.expand(len(draws.indices), -1), context
        return self._timesteps(draws, frames), self.context

    def _windows(self, draws: Draws) -> tuple[Tensor, ForcedContext]:
        """Timesteps `[F]` and attention of the output windows of one rollout, drawn as in DMD."""
        frames, layout = scored_frames(self.config), self.layout
        config = replace(self.config, num_training_frames=frames, seed=draws.seed)
        plan = plan_rollout(config, draws.update)
        windows = output_windows(self.config, plan)
        timesteps = level_timesteps(self.config)
        per_block = [timesteps[level] for window in windows for _, level in window]
        per_frame = [t.expand(layout.frames(block)) for block, t in enumerate(per_block)]
        spans = tuple(
            range(layout.start(window.blocks[0]), layout.start(window.blocks[-1] + 1))
            for window in windows
        )
        if spans not in self.windowed:
            self.windowed[spans] = ForcedContext(
                context_policy(self.config),
                [range(layout.start(b), layout.start(b + 1)) for b in range(plan.num_blocks)],
                spans,
                self.shape.grid,
                self.generator.config.head_dim,
                self.world.device,
                self.generator.attention_backend,
            )
        return torch.cat(per_frame), self.windowed[spans]

    def _timesteps(self, draws: Draws, frames: int) -> Tensor:
        """One timestep per video, or per block with `diffusion_forcing`: `[B, F]`."""
        if not self.config.diffusion_forcing:
            uniform = draws.uniform(Purpose.TIMESTEP)[:, None].expand(-1, frames)
        else:
            blocks = self.layout.blocks_for(frames)
            starts = [self.layout.start(block) for block in range(blocks)]
            uniform = block_levels(draws.uniform(Purpose.TIMESTEP, (frames,)), starts)
        return shift_timesteps(1000 * (1 - uniform), self.config.generator_shift)


class VaeTraining(Task):
    """Reconstruction and KL of a causal video VAE; its statistics are folded in at export."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        super().__init__(config, world, plan, timer, data)
        check_auxiliary_data(config, data)
        self.autoencoder = build_trained_vae(config, world)
        self.players = {"vae": make_player(config, "vae", self.autoencoder, ema=True)}

    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        video = self._video(batch)
        latent = self.autoencoder.latent_shape(video)
        noise = draws.normal(Purpose.NOISE, latent).to(self.world.device)
        with self.timer.phase("forward"):
            return vae_loss(
                self.autoencoder,
                video,
                noise,
                kl_weight=self.config.vae.kl_weight,
                l1_weight=self.config.vae.l1_weight,
                edge_weight=self.config.vae.edge_weight,
            )

    def flops(self, phase: str, draws: Draws) -> None:
        """See `Task`."""

    def export(self, folder: Path) -> None:
        """See `Task`."""
        export_vae(folder, self.players["vae"], self.data, self.world)


class TextEncoderTraining(Task):
    """A umt5 encoder whose tokens know their subject, where no pretrained one fits (shapes)."""

    def __init__(
        self, config: Config, world: World, plan: BatchPlan, timer: Timer, data: Dataset
    ) -> None:
        super().__init__(config, world, plan, timer, data)
        check_auxiliary_data(config, data)
        self.encoder = build_text_encoder(config, world)
        self.reader = build_caption_reader(config, world, self.encoder, token_classes())
        self.players = {"text": make_player(config, "text", self.reader)}

    def loss(self, phase: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        tokens = self._tokens(batch["prompt"])
        labels = self._labels(batch["prompt"], tokens.ids.shape[1])
        return caption_loss(self.reader, tokens.ids, tokens.mask, labels)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`; without the worst attribute, which is no mean over captions."""
        result = self.loss(self.heldout_phase, batch, draws)
        accuracy = result.metrics["caption/accuracy"]
        return LossResult(result.loss, {"caption/accuracy": accuracy})

    def _tokens(self, captions: Sequence[str]) -> TokenBatch:
        """Ids and mask `[B, L]`, L the length of the longest caption."""
        prompts = [clean_prompt(caption) for caption in captions]
        tokens = self.encoder.tokenizer(prompts, self.encoder.text_len)
        used = int(tokens.mask.sum(dim=1).max())
        device = self.world.device
        return TokenBatch(tokens.ids[:, :used].to(device), tokens.mask[:, :used].to(device))

    def _labels(self, captions: Sequence[str], length: int) -> Tensor:
        """`[B, length, attributes]`; -1: no value."""
        split = self.encoder.tokenizer.split
        labels = torch.full((len(captions), length, len(self.reader.classes)), -1)
        for row, caption in zip(labels, captions, strict=True):
            said = token_labels(clean_prompt(caption), lambda text: len(split(text)))
            cut = said[: self.encoder.text_len - 1]  # the last token marks the end
            row[: len(cut)] = torch.tensor(cut)
        return labels.to(self.world.device)

    def flops(self, phase: str, draws: Draws) -> None:
        """See `Task`."""

    def export(self, folder: Path) -> None:
        """See `Task`."""
        export_text_encoder(folder, self.players["text"], is_main=self.world.is_main)


TASKS: dict[str, type[Task]] = {
    "text_encoder": TextEncoderTraining,
    "vae": VaeTraining,
    "score_distillation": Distillation,
    "ode": OdeInitialisation,
    "diffusion": FlowMatching,
}
