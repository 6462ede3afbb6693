"""What every task has: trained networks, and how a batch becomes a loss.

The objectives themselves are in `model/`; a task feeds them with networks, text and draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.ode_regression import block_levels
from model.result import LossResult
from model.self_rollout import RolloutRecipe
from pipeline.setup import Setup
from pipeline.text_to_video import VideoPipeline
from trainer.data import BatchSplit, check_changes, check_embeddings
from trainer.export import Writer, export_generator
from trainer.metrics import Timer
from trainer.networks import Player, build_generator, build_text, build_vae
from trainer.sharding import World
from utils.config import Config
from utils.datasets import Dataset
from utils.devices import to_device
from utils.draws import Draws, Purpose
from utils.embeddings import pad_batch
from utils.errors import UserError
from utils.video import to_float
from wan.context import AttentionContext, MaskedContext, frame_mask
from wan.dit import DiTConfig, WanDiT
from wan.flops import attention_flops, forward_flops, training_flops
from wan.flow import add_noise

Batch = dict[str, Any]


@dataclass(frozen=True)
class TaskInputs:
    """What a training hands to its task: the experiment, this rank's share of it, and the data."""

    config: Config
    setup: Setup
    world: World
    batch_split: BatchSplit
    timer: Timer
    data: Dataset
    look: Callable[[], None]
    """Stands between passes, on all ranks alike: leaves the training where it is to stop."""


class Task(ABC):
    """Trained networks (`players`), and what one update of each does with a micro-batch."""

    players: dict[str, Player]
    roles: ClassVar[tuple[str, ...]] = ()
    """The transformers it holds: of `generator`, `real_score`, `fake_score`, `target`."""

    def __init__(self, given: TaskInputs) -> None:
        self.config = given.config
        self.setup = given.setup
        self.world = given.world
        self.batch_split = given.batch_split
        self.timer = given.timer
        self.data = given.data
        self.look = given.look
        if self.config.i2v:
            raise UserError("training starts from noise, not from images: set i2v=false")

    @classmethod
    def networks(cls, config: Config) -> dict[str, str]:
        """Role -> model folder of the transformers it holds."""
        names = {
            "generator": config.generator_name,
            "real_score": config.real_name,
            "fake_score": config.fake_name,
        }
        return {role: names[role] for role in cls.roles}

    @classmethod
    @abstractmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """Raise UserError unless the items are what it trains on."""

    @classmethod
    def check_data(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """Raise UserError unless it can train on these data, all texts included."""
        cls.check_items(config, setup, data)
        check_changes(config, data)
        if cls.roles:
            check_embeddings(config, data)

    @property
    def warmup_steps(self) -> int:
        """Steps at the beginning in which not all players take their turns."""
        return 0

    def due(self, step: int) -> Sequence[str]:
        """Players that are updated in a step, in order."""
        return tuple(self.players)

    def keeps_batch(self, player: str, step: int) -> bool:
        """Whether the player's next update, after that of a step, is on the same batch."""
        return False

    def collect(self, metrics: Mapping[str, Tensor]) -> None:  # noqa: B027 - most keep nothing
        """Keep for `derive` what is no number (0-d) in a micro-batch of an update that was made."""

    def derive(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What follows from the metrics of a line of the log, which are means over the ranks.

        All ranks have to call it.
        """
        if len(self.players) > 1:
            return {}
        return {"loss": metrics[f"{next(iter(self.players))}/loss"]}

    def state_dict(self) -> dict[str, Any]:
        """What `collect` has kept, as plain values of all ranks, which have to call it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - as `collect`
        """Go on where `state_dict` was taken."""

    @abstractmethod
    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """The loss of a micro-batch for one player."""

    @property
    def heldout_player(self) -> str:
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
        return self.loss(self.heldout_player, batch, draws)

    def flops(self, player: str, draws: Draws) -> int | None:
        """Floating-point operations of one video's share of an update; None: not known."""
        phases = self.phase_flops(player, draws)
        return None if phases is None else sum(phases.values())

    def kind(self, draws: Draws) -> str:
        """What is run in an update; those of a kind differ in length alone."""
        return ""

    @abstractmethod
    def phase_flops(self, player: str, draws: Draws) -> dict[str, int] | None:
        """The same in each phase of the timer that runs transformers, backward passes included."""

    @abstractmethod
    def export(self) -> Writer | None:
        """Copy the weights; what writes them in the published form, on the main rank.

        All ranks have to call it.
        """

    def sampler(self) -> VideoPipeline | None:
        """What makes sample videos of the student as it is, if it can."""
        return None

    def _video(self, batch: Batch, frames: int | None = None) -> Tensor:
        """Video of a batch `[B, F, 3, H, W]` in [-1, 1]: its first `frames`, by default all."""
        if "video" not in batch:
            raise UserError("the data hold no videos: set data_path to a folder of them")
        clips = (torch.as_tensor(clip)[:frames] for clip in batch["video"])
        return torch.stack([to_float(to_device(clip, self.world.device)) for clip in clips])


class GeneratorTask(Task):
    """Tasks that train a transformer as the generator, on clips of `frames` latent frames."""

    roles: ClassVar[tuple[str, ...]] = ("generator",)

    def __init__(self, given: TaskInputs) -> None:
        super().__init__(given)
        config, setup, world = given.config, given.setup, given.world
        self.shape, self.layout = setup.shape, setup.layout
        self.frames = config.image_or_video_shape[1]
        self.generator: WanDiT = build_generator(config, setup, world)
        self.text = build_text(config, setup, world)
        self.vae = build_vae(setup, world) if self._needs_vae() else None

    def export(self) -> Writer | None:
        """See `Task`."""
        player = self.players["generator"]
        return export_generator(self.config, player, is_main=self.world.is_main)

    def sampler(self) -> VideoPipeline:
        """See `Task`."""
        # Not kept as `self.vae`: a VAE there means that the training itself uses one.
        vae = self.vae or build_vae(self.setup, self.world)
        return VideoPipeline(self.setup, self.generator, vae=vae, text=self.text)

    def _needs_vae(self) -> bool:
        return self.config.load_raw_video

    def _embedded(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings `[B, L, dim]`."""
        with self.timer.phase("text"):
            return self.text(prompts)

    def _with_negative(self, cond: Tensor) -> Tensor:
        """Embeddings `[B, L, dim]`, and behind them B times those of the negative prompt."""
        with self.timer.phase("text"):
            negative = self.text.negative().expand(len(cond), -1, -1)
            return pad_batch([*cond, *negative])

    def _backward_flops(self, forward: int, attention: int) -> int:
        """Operations of the backward pass of a forward pass, with what is computed once more.

        `attention`: of the forward pass.
        """
        kept = attention if self.config.selective_checkpointing else 0
        whole = training_flops(forward, checkpointing=self.config.gradient_checkpointing, kept=kept)
        return whole - forward

    def _clip_flops(self, sizes: DiTConfig, frames: int) -> tuple[int, int]:
        """Operations of a forward pass whose frames all see each other; of its attention."""
        tokens = self.shape.tokens_per_frame
        attention = attention_flops(sizes, frames * tokens, frames * tokens)
        return forward_flops(sizes, frames, frames, tokens), attention

    def _per_block(self, drawn: Tensor) -> Tensor:
        """Of a draw for each frame `[B, F]` that of its block's first one."""
        return block_levels(drawn, self._starts(drawn.shape[1]))

    def _starts(self, frames: int) -> list[int]:
        """The first frame of each block of a clip."""
        return [self.layout.start(block) for block in range(self.layout.blocks_for(frames))]

    def _latents(self, batch: Batch, frames: int | None = None) -> Tensor:
        """Clean latents of a batch `[B, F, C, h, w]`, encoded here if the data are videos.

        The first `frames` of them, by default as many as the config says.
        """
        frames = self.frames if frames is None else frames
        if "latents" in batch:
            return to_device(batch["latents"][:, :frames], self.world.device)
        assert self.vae is not None, "load_raw_video loads it"
        with self.timer.phase("encode"):
            video = self._video(batch, self.shape.video_frames(frames))
            return self.vae.encode(video).float()

    def _clean(self, batch: Batch, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The frames that noisy ones look back at, and their timesteps `[B, F]`.

        They are those of the clip, or of another one up to the block where its prompt changes:
        windows before look back at that one alone, later ones at both.
        """
        if "before" in batch:
            behind = self._starts(self.frames)[1:] or [self.frames]
            ends = torch.tensor([behind[int(x * len(behind))] for x in batch["change"]])
            earlier = torch.arange(self.frames) < ends[:, None]
            mask = to_device(earlier[:, :, None, None, None], latents.device)
            before = to_device(batch["before"][:, : self.frames], latents.device)
            latents = torch.where(mask, before, latents)
        noise = to_device(draws.normal(Purpose.CLEAN_NOISE, latents.shape[1:]), latents.device)
        level = draws.uniform(Purpose.CLEAN_TIMESTEP) * self.config.clean_context_noise
        timesteps = to_device(level, latents.device)[:, None].expand(-1, latents.shape[1])
        return add_noise(latents, noise, timesteps), timesteps

    def _parallel_context(self, *, teacher_forcing: bool = False) -> AttentionContext:
        """Block-causal attention of parallel training."""
        frames = self.frames
        mask = frame_mask(
            frames,
            self.layout.block_frames,
            local_frames=self.setup.policy.max_frames,
            independent_first_frame=self.layout.independent_first_frame,
            teacher_forcing=teacher_forcing,
        )
        positions = tuple(range(frames)) * (2 if teacher_forcing else 1)
        head_dim = self.generator.config.head_dim
        return MaskedContext(mask, positions, self.shape.grid, head_dim, self.world.device)


def rollout_recipe(config: Config) -> RolloutRecipe:
    """How a config draws its training rollouts."""
    return RolloutRecipe(
        seed=config.seed,
        num_levels=config.num_levels,
        scored_frames=config.image_or_video_shape[1],
        longest=config.num_training_frames,
        rolling_probability=config.rolling_probability,
        last_step_only=config.last_step_only,
        same_step_across_blocks=config.same_step_across_blocks,
        scored_clip=config.scored_clip,
        same_step_across_videos=config.same_step_across_videos,
        true_prefix_probability=config.true_prefix_probability,
    )
