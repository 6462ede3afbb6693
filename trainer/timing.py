"""Real updates of a training, timed by phase: what `scripts/benchmark.py --train` measures.

The training is the trainer's own: its steps, its data, its phases, on as many ranks as there are.
Nothing is kept of it.
"""

import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.setup import Setup
from pipeline.timing import Memory
from trainer.estimate import model_folder
from trainer.metrics import Timer
from trainer.networks import sizes_of
from trainer.sharding import World
from trainer.tasks import find_task
from trainer.trainer import Trainer
from utils.config import Config
from utils.datasets import write_shard
from utils.draws import Draws
from utils.embeddings import write_shard as write_embeddings
from utils.errors import UserError

ITEMS = 4  # of drawn data
DRAWS = 100  # updates whose operations give the mean
NEVER = 10**9
OTHER, BESIDE = "other", "beside the updates"


@dataclass(frozen=True)
class Update:
    """One update of a player on a rank, or what a step does beside them.

    `seconds`, `memory` (bytes, the peak) and `flops` by phase; of `other` what lies between them.
    """

    kind: str
    seconds: dict[str, float]
    memory: dict[str, int]
    flops: dict[str, float]


# --- a training that is timed --------------------------------------------------------------------


class PhaseTimer(Timer):
    """Also knows the peak memory of each phase: allocated on a GPU, elsewhere resident."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}

    def _charge(self) -> None:
        super()._charge()
        name = self._open[-1] if self._open else OTHER
        peak = Memory.of(self._device).peak
        self.peaks[name] = max(self.peaks.get(name, 0), peak)
        Memory.forget_peak(self._device)

    def taken(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and peaks of the phases since the last call, and of `other`."""
        seconds = self.read()
        whole = seconds.pop("step")
        peaks, self.peaks = self.peaks, {}
        return {**seconds, OTHER: whole - sum(seconds.values())}, peaks


class TimedTrainer(Trainer):
    """A training that writes down what each of its updates took."""

    timer: PhaseTimer

    def __init__(self, config: Config, world: World, folder: Path, setup: Setup | None) -> None:
        self.made: list[Update] = []
        timer = PhaseTimer(world.device)
        super().__init__(
            config, world, folder, save=False, visualise=False, setup=setup, timer=timer
        )

    def update(self, name: str) -> None:
        """See `Trainer`."""
        self.timer.taken()
        super().update(name)
        draws = Draws(self.config.seed, self._update_number(name), ())
        self.made.append(Update(self.kind(name), *self.timer.taken(), self.rank_flops(name, draws)))

    def train_step(self) -> dict[str, Any]:
        """See `Trainer`."""
        metrics = super().train_step()
        self.made.append(Update(BESIDE, *self.timer.taken(), {}))
        return metrics

    def kind(self, name: str, step: int | None = None) -> str:
        """What updates have in common that cost alike: a critic's may use a rollout again."""
        step = self.step if step is None else step
        again = step > 0 and self.task.keeps_batch(name, step - 1)
        return f"{name}, on the rollout before" if again else name

    def rank_flops(self, name: str, draws: Draws) -> dict[str, float]:
        """Operations of a rank's share of an update, by phase; none where they are not known."""
        share = self.batch_split.videos / self.world.size
        phases = self.task.phase_flops(name, draws) or {}
        return {phase: share * count for phase, count in phases.items()}

    def cycle(self) -> Counter[str]:
        """How many updates of each kind there are until all is as before."""
        steps = self.config.dfake_gen_update_ratio if len(self.task.players) > 1 else 1
        second = self.task.warmup_steps + steps
        return Counter(
            self.kind(name, step)
            for step in range(second, second + steps)
            for name in self.task.due(step)
        )

    def run(self, updates: int) -> None:
        """So many updates of each kind, in as few steps as may be; others are passed over."""
        kinds, made = self.cycle(), Counter[str]()
        while short := [kind for kind in kinds if made[kind] < updates]:
            steps = self._together()
            due = [self.kind(name, step) for step in steps for name in self.task.due(step)]
            if min(short, key=kinds.__getitem__) in due:
                for _ in steps:
                    self.train_step()
                made.update(due)
            else:
                self.step = steps.stop

    def _together(self) -> range:
        """The next step, and those behind it that use its rollouts again."""
        end = self.step + 1
        while any(self.task.keeps_batch(name, end - 1) for name in self.task.players):
            end += 1
        return range(self.step, end)

    def usual_flops(self, kind: str) -> float:
        """Operations of a rank's share of an update of this kind, the mean over many draws."""
        step, found = self.task.warmup_steps, list[float]()
        while len(found) < DRAWS:
            for name in self.task.due(step):
                if self.kind(name, step) == kind:
                    number = step * len(self.task.players) + list(self.task.players).index(name)
                    draws = Draws(self.config.seed, number, ())
                    found.append(sum(self.rank_flops(name, draws).values()))
            step += 1
        return statistics.mean(found)


# --- without data and weights --------------------------------------------------------------------


def timed_config(config: Config) -> Config:
    """The training as it is in its midst: averages are made, and nothing is measured or logged."""
    return replace(
        config,
        max_steps=None,
        lr_schedule="constant",  # a cosine has an end
        heldout_every=0,
        sample_every=0,
        metrics_every=NEVER,
        ema_start_step=0,
    )


def drawn_setup(config: Config) -> Setup:
    """The setup of a training whose weights are drawn: sizes from its model folder, or a preset."""
    folder = model_folder(config, config.generator_name)
    strides = None if folder is None else folder.strides
    return Setup.of(config, sizes=sizes_of(config, config.generator_name), strides=strides)


def with_drawn_data(config: Config, setup: Setup, folder: Path) -> Config:
    """The training on noise and text embeddings that are written to a folder.

    Raises:
        UserError: it trains something else than transformers.
    """
    if not find_task(config.trainer).roles:
        raise UserError(
            f"trainer: {config.trainer} trains on its own data: leave out --random_weights"
        )
    draw = torch.Generator().manual_seed(0)
    prompts = [f"a video of noise, number {number}" for number in range(ITEMS)]
    text = (setup.sizes.text_len, setup.sizes.text_dim)
    texts = dict.fromkeys((*prompts, config.negative_prompt, ""))
    shards = {name: folder / name for name in ("text", "data")}
    for shard in shards.values():
        shard.mkdir()
    embeddings = {prompt: torch.randn(text, generator=draw) for prompt in texts}
    write_embeddings(shards["text"] / "0.safetensors", embeddings)
    shape: tuple[int, ...] = (config.image_or_video_shape[1], *setup.shape.latent)
    steps = None
    if config.trainer == "ode":
        steps = [*setup.levels.tensor().tolist(), 0.0]
        shape = (len(steps), *shape)
    items = torch.randn(ITEMS, *shape, generator=draw)
    write_shard(shards["data"] / "0.safetensors", items, prompts, timesteps=steps)
    return replace(
        config,
        data_path=str(shards["data"]),
        text_embeddings=str(shards["text"]),
        extended_data_path=None,
        load_raw_video=False,
        random_init=False,
    )


def opened(config: Config, world: World, folder: Path, *, drawn: bool) -> TimedTrainer:
    """The training of a config, ready to run, with what it needs in a folder of this rank's own."""
    setup = None
    if drawn:
        setup = drawn_setup(config)
        config = with_drawn_data(config, setup, folder)
        setup = setup.under(config)
    return TimedTrainer(config, world, folder / "run", setup)
