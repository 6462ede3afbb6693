"""What each phase of a training step takes of a rank, found by running it without memory.

The task, its losses, FSDP2, optimiser and average are those of the training, at its true sizes; see
`trainer/planned.py`. Networks have a part of their layers, twice, and the rest is in proportion:
all layers are alike, so memory and operations grow by the same with each.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import trainer.networks
from pipeline.setup import Setup
from trainer.data import split_batches
from trainer.live_memory import GRADIENTS, META, LiveMemory
from trainer.metrics import Timer
from trainer.networks import Player, sizes_of, stays_gathered
from trainer.planned import PlannedText, planned_config, planned_world
from trainer.sharding import local
from trainer.tasks import find_task
from trainer.tasks.base import GeneratorTask, Task, TaskInputs
from trainer.updates import Updates
from utils.config import Config
from utils.draws import Draws
from wan.checkpoints import empty_dit
from wan.dit import DiTConfig

UPDATES = 100  # of each player, of which the average and the heaviest are looked for
WEIGHTS = {
    "generator": "student",
    "real_score": "teacher",
    "fake_score": "critic",
    "target": "target",
}
ROLES = {"generator": "generator", "critic": "fake_score"}
OPTIMISER, AVERAGE, VAE = "optimiser", "average", "VAE"


@dataclass(frozen=True)
class Phase:
    """A phase of a player's update: the most bytes at once, by part, and operations.

    `name` as the timer's; `flops` of one micro-batch of a rank, as they are run.
    """

    player: str
    name: str
    parts: Mapping[str, int]
    flops: int

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Footprint:
    """Of the heaviest update of each player that is drawn.

    `flops`: of one video's share of an average update, by player and phase, as the training counts
    them. `updates`: of each player in one step, on average, once all take their turns.
    """

    phases: tuple[Phase, ...]
    flops: Mapping[str, Mapping[str, float]]
    updates: Mapping[str, float]

    @property
    def peak(self) -> int:
        """Of all phases."""
        return max(phase.peak for phase in self.phases)

    @property
    def step_flops(self) -> float:
        """One video's share of an average step, once all players take their turns."""
        return sum(self.updates[name] * sum(own.values()) for name, own in self.flops.items())


def footprint(config: Config, setup: Setup, ranks: int, local_ranks: int) -> Footprint:
    """What a rank of `ranks` needs, `local_ranks` of them on a node.

    Takes seconds, and neither weights nor data.
    """
    assert is_known(config), "only what trains transformers is known"
    config = planned_config(config)
    names = set(find_task(config.trainer).networks(config).values())
    depths = [sizes_of(config, name).num_layers for name in names]
    parts = math.gcd(*depths)
    if parts < 4:
        return measured(config, setup, ranks, local_ranks, parts, parts)
    one, two = (measured(config, setup, ranks, local_ranks, n, parts) for n in (1, 2))
    return _extended(one, two, parts)


def is_known(config: Config) -> bool:
    """Whether the task is one of those that train transformers."""
    return issubclass(find_task(config.trainer), GeneratorTask)


def _extended(one: Footprint, two: Footprint, parts: int) -> Footprint:
    """Of all parts of the layers, by those of one and of two."""

    def line(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
        names = dict.fromkeys((*first, *second))
        return {
            name: first.get(name, 0) + (second.get(name, 0) - first.get(name, 0)) * (parts - 1)
            for name in names
        }

    pairs = zip(one.phases, two.phases, strict=True)
    phases = tuple(
        Phase(a.player, a.name, line(a.parts, b.parts), a.flops + (b.flops - a.flops) * (parts - 1))
        for a, b in pairs
    )
    flops = {player: line(own, two.flops[player]) for player, own in one.flops.items()}
    return Footprint(phases, flops, one.updates)


def measured(
    config: Config, setup: Setup, ranks: int, local_ranks: int, parts: int, of: int
) -> Footprint:
    """Of networks with so many parts of their layers."""
    split = split_batches(config, ranks)
    rows = -(-split.videos // (split.accumulation * ranks))
    with planned_task(config, setup, ranks, local_ranks, parts, of) as (task, memory, shaped):
        timer = task.timer
        assert isinstance(timer, MemoryTimer)
        _name_parts(task, memory)
        for name, player in task.players.items():  # as all of their layers would decide
            sizes = sizes_of(config, task.networks(config)[ROLES[name]])
            player.stays_gathered = stays_gathered(config, empty_dit(sizes))
        found = {name: heaviest_updates(task, name) for name in task.players}
        batch, flops = _batch(config, shaped, rows), Counter[tuple[str, ...]]()
        for player in task.players.values():
            _start(player, memory)
        for name, player in task.players.items():
            timer.player = name
            updates = Updates(task, {name: _Given(batch, rows)}, Path(), None)  # type: ignore[dict-item]
            for number in found[name][0]:
                if split.accumulation > 1:
                    _accumulate(player, memory)
                updates.update(player, 0, number)
                for key, peak in memory.phases.items():
                    flops[key], peak.flops = max(flops[key], peak.flops), 0
        phases = tuple(
            Phase(name, phase, dict(peak.parts), flops[name, phase])
            for (name, phase), peak in memory.phases.items()
        )
        updates_of = often(task)
    return Footprint(phases, {name: mean for name, (_, mean) in found.items()}, updates_of)


@contextmanager
def planned_task(
    config: Config, setup: Setup, ranks: int, local_ranks: int, parts: int, of: int
) -> Iterator[tuple[GeneratorTask, LiveMemory, Setup]]:
    """A task whose networks have so many parts of their layers and take no memory; its setup."""

    def cut(sizes: DiTConfig) -> DiTConfig:
        return replace(sizes, num_layers=sizes.num_layers * parts // of)

    def cut_sizes(config: Config, name: str) -> DiTConfig:
        return cut(sizes_of(config, name))

    shaped = replace(setup, folder=None, sizes=cut(setup.sizes), text_embeddings=None)
    split = split_batches(config, ranks)
    with (
        patch.object(trainer.networks, "sizes_of", cut_sizes),
        planned_world(config, ranks, local_ranks) as (world, memory),
    ):
        rows = -(-split.videos // (split.accumulation * ranks))
        once = replace(split, accumulation=1, videos=rows * ranks, batch_size=rows)
        data: Any = None  # its items are made here
        asked = replace(config, text_encoder_device="cpu", text_embeddings=None)
        given = TaskInputs(asked, shaped, world, once, MemoryTimer(memory), data, lambda: None)
        task = find_task(config.trainer)(given)
        assert isinstance(task, GeneratorTask)
        task.text = PlannedText(config, setup, world, memory)
        yield task, memory, shaped


def update_flops(config: Config, setup: Setup) -> dict[str, float]:
    """Of one video's share of an average update, by player, on one rank; nothing is run."""
    config = replace(planned_config(config), mixed_precision=False)  # then nothing is sharded
    with planned_task(config, setup, 1, 1, 1, 1) as (task, _, _):
        return {name: sum(heaviest_updates(task, name)[1].values()) for name in task.players}


def often(task: GeneratorTask) -> dict[str, float]:
    """Updates of each player in one step, on average, once all take their turns."""
    steps = range(task.warmup_steps, task.warmup_steps + UPDATES)
    due = Counter(name for step in steps for name in task.due(step))
    return {name: due[name] / UPDATES for name in task.players}


class MemoryTimer(Timer):
    """Follows memory where the training's own follows time."""

    def __init__(self, memory: LiveMemory) -> None:
        super().__init__()
        self.memory = memory
        self.player = ""

    @contextmanager
    def phase(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """See `Timer`."""
        with self.memory.phase(self.player, name), super().phase(name, whole=whole):
            yield


class _Given:
    """Stands for `Batches`: the same items for ever."""

    def __init__(self, batch: dict[str, Any], rows: int) -> None:
        self.batch = batch
        self.rows = rows

    def micro_batch(
        self, micro: int, draws: Draws, passed_over: int = 0
    ) -> tuple[dict[str, Any], Draws, float]:
        """See `Batches`."""
        return dict(self.batch), draws.for_indices(range(self.rows)), 1.0

    def read_ahead(self, micro: int, draws: Draws, passed_over: int = 0) -> None:
        """See `Batches`."""

    def advance(self, passed_over: int = 0) -> None:
        """See `Batches`."""


def heaviest_updates(task: Task, name: str) -> tuple[list[int], dict[str, float]]:
    """Numbers of a player's heaviest updates of each kind; operations by phase on average.

    The heaviest backward pass tells the largest graph.
    """
    order = list(task.players)
    turns = range(task.warmup_steps, task.warmup_steps + UPDATES * len(order))
    steps = [step for step in turns if name in task.due(step)][:UPDATES]
    numbers = [step * len(order) + order.index(name) for step in steps]
    found = [task.phase_flops(name, Draws(task.config.seed, n, ())) or {} for n in numbers]
    heaviest: dict[str, int] = {}
    weights = [(phases.get("backward", 0), sum(phases.values())) for phases in found]
    for index in sorted(range(len(numbers)), key=weights.__getitem__):
        heaviest[task.kind(Draws(task.config.seed, numbers[index], (0,)))] = numbers[index]
    total: Counter[str] = Counter()
    for phases in found:
        total.update(phases)
    mean = {phase: flops / len(found) for phase, flops in total.items()}
    return list(heaviest.values()), mean


def _name_parts(task: GeneratorTask, memory: LiveMemory) -> None:
    for role, part in WEIGHTS.items():
        attribute = {"real_score": "teacher", "fake_score": "fake_score"}.get(role, role)
        for place in (role, attribute):
            network = task.__dict__.get(place)
            if network is not None:
                memory.named(part, map(local, network.parameters()))
    if task.vae is not None:
        memory.named(VAE, (*task.vae.model.parameters(), *task.vae.model.buffers()))


def _start(player: Player, memory: LiveMemory) -> None:
    """What a player holds after its first updates."""
    for parameter in player.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    player.apply()
    states = player.optimiser.state.values()
    memory.named(OPTIMISER, (local(x) for own in states for x in own.values() if x.ndim))
    player.update_ema(active=True, moved=False)
    if player.ema is not None:
        memory.named(AVERAGE, map(local, player.ema.shadow.values()))


def _accumulate(player: Player, memory: LiveMemory) -> None:
    """The gradients of earlier micro-batches."""
    with memory.making(GRADIENTS):
        for parameter in player.trained.values():
            parameter.grad = torch.zeros_like(parameter)


def _batch(config: Config, setup: Setup, rows: int) -> dict[str, Any]:
    """Items of every kind that the task may ask for."""
    frames = config.image_or_video_shape[1]
    clip = (rows, frames, *setup.shape.latent)
    batch: dict[str, Any] = {"prompt": [f"prompt {row}" for row in range(rows)]}
    if config.trainer == "ode":
        levels = len(setup.levels.tensor()) + 1
        batch["trajectory"] = torch.zeros(rows, levels, *clip[1:])
    elif config.load_raw_video:
        pixels = (setup.shape.video_frames(frames), 3, setup.shape.height, setup.shape.width)
        batch["video"] = [torch.zeros(pixels, dtype=torch.uint8, device=META)] * rows
    else:
        batch["latents"] = torch.zeros(clip)
    return batch
