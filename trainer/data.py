"""Batches: which item of the data goes to which rank, micro-batch and row."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.setup import Setup
from utils.config import Config
from utils.datasets import (
    UNLIMITED,
    Dataset,
    GlobalOrder,
    LatentDataset,
    OdePairDataset,
    VideoDataset,
    collate,
    open_dataset,
)
from utils.draws import Draws, Purpose
from utils.embeddings import EmbeddingStore
from utils.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """How the videos of one update are spread over micro-batches, and those over ranks.

    As evenly as their number allows: a rank may have a row fewer than another, or none.
    """

    videos: int
    batch_size: int
    accumulation: int
    ranks: int
    notes: tuple[str, ...] = ()

    @property
    def is_even(self) -> bool:
        """Whether all ranks have equally many rows in all micro-batches."""
        return self.videos % (self.accumulation * self.ranks) == 0

    def indices(self, micro: int, rank: int) -> tuple[int, ...]:
        """Indices in the global batch of one micro-batch of one rank; perhaps none."""
        first, count = _part(self.videos, micro, self.accumulation)
        start, rows = _part(count, rank, self.ranks)
        return tuple(range(first + start, first + start + rows))

    def indices_or_one(self, micro: int, rank: int) -> tuple[int, ...]:
        """The same; where there are none, one of its own behind the global batch, of no weight."""
        own = self.indices(micro, rank)
        return own or (self.videos + micro * self.ranks + rank,)

    def weight(self, rows: int) -> float:
        """Of the mean over so many rows, such that means over the ranks are means over videos."""
        return rows * self.ranks / self.videos

    def describe(self) -> str:
        """The start-up line."""
        each = f"{self.videos // (self.accumulation * self.ranks)}"
        if not self.is_even:
            fewest = min(
                len(self.indices(micro, rank))
                for micro in range(self.accumulation)
                for rank in range(self.ranks)
            )
            each = f"{fewest} or {fewest + 1}"
        return (
            f"{self.ranks} ranks x {each} videos x {self.accumulation} micro-batches "
            f"= {self.videos} videos per update"
        )


def _part(count: int, number: int, parts: int) -> tuple[int, int]:
    """Start and length of one of `parts` parts of `count` things, as even as can be."""
    start, end = number * count // parts, (number + 1) * count // parts
    return start, end - start


def split_batches(config: Config, ranks: int) -> BatchSplit:
    """Accumulation from `global_batch_size` > `total_batch_size` > the given accumulation.

    Raises:
        UserError: there are more ranks than videos in an update.
    """
    notes: list[str] = []
    wanted = config.global_batch_size or config.total_batch_size
    per_step = config.batch_size * ranks
    given = config.gradient_accumulation_steps
    accumulation = given or 1 if wanted is None else -(-wanted // per_step)
    videos = wanted or per_step * accumulation
    if videos < ranks:
        raise UserError(
            f"{videos} videos per update are too few for {ranks} ranks: start at most {videos}, or "
            f"set global_batch_size={ranks}"
        )
    disagreeing = [
        f"{name}={value}"
        for name, value, meant in (
            ("total_batch_size", config.total_batch_size, videos),
            ("gradient_accumulation_steps", given, accumulation),
        )
        if value is not None and value != meant
    ]
    if disagreeing:
        notes.append(
            f"{' and '.join(disagreeing)} disagree with {videos} videos per update, "
            f"which means {accumulation} micro-batches; the latter holds"
        )
    if config.recipe_batch_size and videos < config.recipe_batch_size:
        notes.append(
            f"{videos} videos per update are fewer than the recipe's "
            f"{config.recipe_batch_size}: set global_batch_size={config.recipe_batch_size}"
        )
    split = BatchSplit(videos, config.batch_size, accumulation, ranks)
    if not split.is_even:
        notes.append(
            f"{videos} videos are not shared evenly by {ranks} ranks: an update takes the time of "
            f"{accumulation * per_step}"
        )
    return replace(split, notes=tuple(notes))


@dataclass(frozen=True)
class _Share:
    """What a rank has of a micro-batch: items by their index in the data, draws, weight.

    `cuts`: draws by the place in the data, for what is the same whenever a batch is read again.
    """

    items: tuple[int, ...]
    draws: Draws
    cuts: Draws
    weight: float


class Batches:
    """Micro-batches of this rank, and the data position.

    Each player reads its own sequence of the data; its position counts items of the global batch,
    so it means the same on any number of ranks. One micro-batch is read ahead, by a thread.

    `changes`: share of the items that come with another one's latents, `before` `[B, F, C, h, w]`
    (of the others these are their own), and `change`: where in [0, 1) each becomes its own.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_split: BatchSplit,
        rank: int,
        seed: int,
        *,
        changes: float = 0.0,
    ) -> None:
        self.dataset = dataset
        self.changes = changes
        self.batch_split = batch_split
        self.rank = rank
        self.order = GlobalOrder(len(dataset), seed)
        self.position = 0
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[_Share, Future[dict[str, Any]]] | None = None

    def micro_batch(
        self, micro: int, draws: Draws, passed_over: int = 0
    ) -> tuple[dict[str, Any], Draws, float]:
        """This rank's items of one micro-batch of the current update, their draws and weight.

        A rank that has no share of it gets an item all the same, of no weight, for its passes with
        the others. `passed_over`: global batches that gave no update, before this one.
        """
        share, ahead = self._share(micro, draws, passed_over), self._ahead
        self._ahead = None
        batch = ahead[1].result() if ahead and ahead[0] == share else self._read(share)
        return batch, share.draws, share.weight

    def read_ahead(self, micro: int, draws: Draws, passed_over: int = 0) -> None:
        """Read what `micro_batch` will be asked for, behind its caller's back.

        An error is raised there, and none if it asks for something else.
        """
        share = self._share(micro, draws, passed_over)
        self._ahead = share, self._reader.submit(self._read, share)

    def _share(self, micro: int, draws: Draws, passed_over: int) -> _Share:
        split = self.batch_split
        indices = split.indices_or_one(micro, self.rank)
        share = split.indices(micro, self.rank)
        first = self.position + passed_over * split.videos
        rows = tuple(self.order.index(first + index) for index in indices)
        own, cuts = draws.for_indices(indices), Draws(draws.seed, first, indices)
        return _Share(rows, own, cuts, split.weight(len(share)))

    def _read(self, share: _Share) -> dict[str, Any]:
        if isinstance(self.dataset, VideoDataset):
            starts = share.cuts.uniform(Purpose.CLIP_START).tolist()
            clips = zip(share.items, starts, strict=True)
            return collate([self.dataset.clip(*clip) for clip in clips])
        items = [self.dataset[number] for number in share.items]
        if self.changes:
            drawn = share.draws.uniform(Purpose.PROMPT_CHANGE, (3,)).tolist()
            for item, (chance, which, place) in zip(items, drawn, strict=True):
                changed = chance < self.changes
                other = self.dataset[int(which * len(self.dataset))] if changed else item
                item["before"], item["change"] = other["latents"], place
        return collate(items)

    def advance(self, passed_over: int = 0) -> None:
        """The update is done: go on to the next global batch.

        `passed_over`: global batches before that gave no update; -1: stay at this one.
        """
        self.position += (1 + passed_over) * self.batch_split.videos


def open_training_data(config: Config, setup: Setup) -> Dataset:
    """The data that `data_path` names."""
    if config.data_path is None:
        raise UserError("the config names no data: set data_path=…")
    return open_dataset(
        config.data_path,
        num_frames=setup.shape.video_frames(config.image_or_video_shape[1]),
        height=config.height,
        width=config.width,
        fps=config.fps,
        extended_path=config.extended_data_path,
    )


def open_heldout_data(
    config: Config, setup: Setup, check: Callable[[Config, Setup, Dataset], None]
) -> Dataset | None:
    """The data that `heldout_data_path` names, where the config measures them.

    `check` raises UserError unless a config trains on data of their kind.

    Raises:
        UserError: there are none, or they are of another kind.
    """
    if not config.heldout_every:
        return None
    own = replace(config, data_path=config.heldout_data_path, extended_data_path=None)
    try:
        data = open_training_data(own, setup)
        check(own, setup, data)
        if config.text_embeddings:
            prompts = first_prompts(data, config.heldout_videos)
            EmbeddingStore(config.text_embeddings).require(prompts)
    except UserError as error:
        raise UserError(f"heldout_data_path: {error}") from error
    return data


def check_videos(config: Config, data: Dataset) -> None:
    """Raise UserError unless the items are videos."""
    if "video" not in data.holds:
        raise UserError(f"{config.data_path} holds no videos: set data_path to a folder of them")


def check_latents(config: Config, setup: Setup, data: Dataset) -> None:
    """Raise UserError unless the items are latents of this config's size, or can be encoded."""
    size = (config.image_or_video_shape[1], *setup.shape.latent)
    if isinstance(data, LatentDataset):
        frames, *frame = data.item_shape
        if frames < size[0] or frame != [*setup.shape.latent]:
            raise UserError(
                f"the latents in {config.data_path} are of {data.item_shape}, the config of "
                f"{size}: encode the videos again with this config"
            )
    elif not ("video" in data.holds and config.load_raw_video):
        raise UserError(
            f"{config.data_path} holds no latents; with videos set load_raw_video=true, or "
            "encode them once with `scripts/precompute.py latents`"
        )


def check_changes(config: Config, data: Dataset) -> None:
    """Raise UserError unless the items are stored latents, if `prompt_change_probability` is on."""
    if config.prompt_change_probability and not isinstance(data, LatentDataset):
        raise UserError(
            f"prompt_change_probability needs stored latents, which {config.data_path} is not: "
            "encode the videos with `scripts/precompute.py latents`"
        )


def check_trajectories(config: Config, setup: Setup, data: Dataset) -> None:
    """Raise UserError unless the items are trajectories at this config's levels, of its size."""
    size = (config.image_or_video_shape[1], *setup.shape.latent)
    if not isinstance(data, OdePairDataset):
        raise UserError(
            f"{config.data_path} holds no trajectories; make them with "
            "`scripts/precompute.py ode_pairs`"
        )
    stored = torch.tensor(data.timesteps)
    meant = torch.cat([setup.levels.tensor(), torch.zeros(1)])
    if stored.shape != meant.shape or not torch.allclose(stored, meant):
        raise UserError(
            f"the trajectories are at timesteps {stored.tolist()}, the config means "
            f"{meant.tolist()}: make them again with this config"
        )
    if data.item_shape[1:] != size:
        raise UserError(
            f"the trajectories are of {data.item_shape[1:]} latents, the config of {size}"
        )


def check_embeddings(config: Config, data: Dataset) -> None:
    """Raise UserError unless all texts of a training that reads stored ones are stored."""
    if not config.text_embeddings:
        return
    store = EmbeddingStore(config.text_embeddings)
    if len(data) < UNLIMITED:
        store.require(data.prompt(index) for index in range(len(data)))
    needed = list(config.sample_prompts) if config.sample_every else []
    guided = config.trainer in ("score_distillation", "consistency")
    if guided or (config.sample_every and not config.distilled):
        needed.append(config.negative_prompt)
    if config.prompt_dropout > 0:
        needed.append("")
    for prompt in needed:
        if prompt not in store:
            raise UserError(
                f"{store.folder} has no embedding of the prompt '{prompt[:60]}', which this config "
                "needs beside those of the data: `scripts/precompute.py text` stores it from a "
                ".txt file, and the negative and the empty prompt with --negative_prompt"
            )


def first_prompts(dataset: Dataset, count: int) -> Sequence[str]:
    """Prompts of the first `count` items, or of all if there are fewer."""
    return [dataset.prompt(index) for index in range(min(count, len(dataset)))]
