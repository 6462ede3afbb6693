"""Batches: which item of the data goes to which rank, micro-batch and row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.components import ModelFiles, level_timesteps, video_shape
from utils.config import Config
from utils.datasets import (
    UNLIMITED,
    Dataset,
    GlobalOrder,
    LatentDataset,
    OdePairDataset,
    ShapesVideos,
    VideoDataset,
    collate,
    open_dataset,
)
from utils.draws import Draws, Purpose
from utils.embeddings import EmbeddingStore
from utils.errors import UserError
from wan.checkpoints import load_dit_config


@dataclass(frozen=True)
class BatchPlan:
    """How the videos of one update are spread: ranks x micro-batches x rows."""

    per_rank: int
    accumulation: int
    ranks: int
    notes: tuple[str, ...] = ()

    @property
    def videos(self) -> int:
        """Videos per update."""
        return self.per_rank * self.accumulation * self.ranks

    def indices(self, micro: int, rank: int) -> tuple[int, ...]:
        """Indices in the global batch of one micro-batch of one rank."""
        start = (micro * self.ranks + rank) * self.per_rank
        return tuple(range(start, start + self.per_rank))

    def describe(self) -> str:
        """The start-up line."""
        return (
            f"{self.ranks} ranks x {self.per_rank} videos x {self.accumulation} micro-batches "
            f"= {self.videos} videos per update"
        )


def plan_batches(config: Config, ranks: int) -> BatchPlan:
    """Accumulation from `global_batch_size` > `total_batch_size` > the given accumulation."""
    notes: list[str] = []
    for name, value in (
        ("global_batch_size", config.global_batch_size),
        ("total_batch_size", config.total_batch_size),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1")
    wanted = config.global_batch_size or config.total_batch_size
    per_step = config.batch_size * ranks
    given = config.gradient_accumulation_steps
    if wanted is None:
        accumulation = given or 1
    else:
        if wanted % per_step:
            raise UserError(
                f"a batch of {wanted} videos cannot be split over {ranks} ranks with batch_size "
                f"{config.batch_size}; make it a multiple of {per_step}"
            )
        accumulation = wanted // per_step
        disagreeing = [
            f"{name}={value}"
            for name, value, meant in (
                ("total_batch_size", config.total_batch_size, wanted),
                ("gradient_accumulation_steps", given, accumulation),
            )
            if value is not None and value != meant
        ]
        if disagreeing:
            notes.append(
                f"{' and '.join(disagreeing)} disagree with {wanted} videos per update, "
                f"which means {accumulation} micro-batches; the latter holds"
            )
    plan = BatchPlan(config.batch_size, accumulation, ranks)
    if config.recipe_batch_size and plan.videos < config.recipe_batch_size:
        notes.append(
            f"{plan.videos} videos per update are fewer than the recipe's "
            f"{config.recipe_batch_size}: set global_batch_size={config.recipe_batch_size}"
        )
    return BatchPlan(config.batch_size, accumulation, ranks, tuple(notes))


class Batches:
    """Micro-batches of this rank, and the data position.

    Each phase reads its own sequence of the data; its position counts items of the global batch,
    so it means the same on any number of ranks.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, rank: int, seed: int) -> None:
        self.dataset = dataset
        self.plan = plan
        self.rank = rank
        self.order = GlobalOrder(len(dataset), seed)
        self.position = 0

    def micro_batch(self, micro: int, draws: Draws) -> tuple[dict[str, Any], Draws]:
        """This rank's items of one micro-batch of the current update, and their draws."""
        indices = self.plan.indices(micro, self.rank)
        own = draws.for_indices(indices)
        rows = [self.order.index(self.position + index) for index in indices]
        if isinstance(self.dataset, VideoDataset):
            starts = own.uniform(Purpose.CLIP_START).tolist()
            items = [self.dataset.clip(*at) for at in zip(rows, starts, strict=True)]
        else:
            items = [self.dataset[row] for row in rows]
        return collate(items), own

    def advance(self) -> None:
        """The update is done: go on to the next global batch."""
        self.position += self.plan.videos


def open_training_data(config: Config) -> Dataset:
    """The data that `data_path` names."""
    if config.data_path is None:
        raise UserError("the config names no data: set data_path=…")
    shape = config.image_or_video_shape
    return open_dataset(
        config.data_path,
        num_frames=1 + 4 * (shape[1] - 1),
        height=config.height,
        width=config.width,
        fps=config.fps,
        extended_path=config.extended_data_path,
    )


def check_auxiliary_data(config: Config, data: Dataset) -> None:
    """Raise UserError unless the data are what a VAE or a text encoder trains on."""
    if config.trainer == "vae" and not isinstance(data, VideoDataset | ShapesVideos):
        raise UserError(f"{config.data_path} holds no videos: set data_path to a folder of them")
    if config.trainer == "text_encoder" and not isinstance(data, ShapesVideos):
        raise UserError("the text encoder is trained on the shapes world: data_path=shapes:train")


def check_training_data(config: Config, data: Dataset, latent: Sequence[int]) -> None:
    """Raise UserError unless the data are what a transformer's objective trains on.

    `latent`: `[C, h, w]` of this config's videos.
    """
    _check_items(config, data, latent)
    if config.text_embeddings:
        _check_embeddings(config, data)


def open_heldout_data(config: Config) -> Dataset | None:
    """The data that `heldout_data_path` names, checked as those of training are; None if unused.

    Raises:
        UserError: there are none, or this config does not train on their kind.
    """
    if not config.heldout_every:
        return None
    own = replace(config, data_path=config.heldout_data_path, extended_data_path=None)
    try:
        data = open_training_data(own)
        if config.trainer in ("vae", "text_encoder"):
            check_auxiliary_data(own, data)
        else:
            sizes = load_dit_config(ModelFiles.find(config, config.generator_name).folder)
            _check_items(own, data, video_shape(config, sizes).latent)
            if config.text_embeddings:
                prompts = first_prompts(data, config.heldout_videos)
                EmbeddingStore(config.text_embeddings).require(prompts)
    except UserError as error:
        raise UserError(f"heldout_data_path: {error}") from error
    return data


def _check_items(config: Config, data: Dataset, latent: Sequence[int]) -> None:
    """What a transformer's objective reads has to be there, in this config's size."""
    size = (config.image_or_video_shape[1], *latent)
    if config.trainer == "ode":
        _check_trajectories(config, data, size)
    elif config.trainer == "diffusion" and isinstance(data, LatentDataset):
        frames, *frame = data.item_shape
        if frames < size[0] or frame != [*latent]:
            raise UserError(
                f"the latents in {config.data_path} are of {data.item_shape}, the config of "
                f"{size}: encode the videos again with this config"
            )
    elif config.trainer == "diffusion":
        videos = isinstance(data, VideoDataset | ShapesVideos)
        if not (videos and config.load_raw_video):
            raise UserError(
                f"{config.data_path} holds no latents; with videos set load_raw_video=true, or "
                "encode them once with scripts/encode_videos.py"
            )


def _check_trajectories(config: Config, data: Dataset, size: tuple[int, ...]) -> None:
    """They have to be at this config's levels, of this config's size."""
    if not isinstance(data, OdePairDataset):
        raise UserError(
            f"{config.data_path} holds no trajectories; make them with "
            "scripts/generate_ode_pairs.py"
        )
    stored = torch.tensor(data.timesteps)
    meant = torch.cat([level_timesteps(config), torch.zeros(1)])
    if stored.shape != meant.shape or not torch.allclose(stored, meant):
        raise UserError(
            f"the trajectories are at timesteps {stored.tolist()}, the config means "
            f"{meant.tolist()}: make them again with this config"
        )
    if data.item_shape[1:] != size:
        raise UserError(
            f"the trajectories are of {data.item_shape[1:]} latents, the config of {size}"
        )


def _check_embeddings(config: Config, data: Dataset) -> None:
    """Every text that the training will ask for has to be stored."""
    store = EmbeddingStore(config.text_embeddings or "")
    if len(data) < UNLIMITED:
        store.require(data.prompt(index) for index in range(len(data)))
    needed = list(config.sample_prompts) if config.sample_every else []
    if config.trainer == "score_distillation" or (config.sample_every and not config.distilled):
        needed.append(config.negative_prompt)
    if config.prompt_dropout > 0:
        needed.append("")
    for prompt in needed:
        if prompt not in store:
            raise UserError(
                f"{store.folder} has no embedding of the prompt '{prompt[:60]}', which this config "
                "needs beside those of the data: scripts/encode_prompts.py stores it from a .txt "
                "file, and the negative and the empty prompt with --negative_prompt"
            )


def first_prompts(dataset: Dataset, count: int) -> Sequence[str]:
    """Prompts of the first `count` items, or of all if there are fewer."""
    return [dataset.prompt(index) for index in range(min(count, len(dataset)))]
