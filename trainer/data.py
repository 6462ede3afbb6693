"""Batches: which item of the data goes to which rank, micro-batch and row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.config import Config
from utils.datasets import Dataset, GlobalOrder, VideoDataset, collate, open_dataset
from utils.draws import Draws, Purpose
from utils.errors import UserError


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
        extended_path=config.extended_data_path,
    )


def first_prompts(dataset: Dataset, count: int) -> Sequence[str]:
    """Prompts of the first items, for sample videos."""
    return [dataset.prompt(index) for index in range(min(count, len(dataset)))]
