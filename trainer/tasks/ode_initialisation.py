"""The task of `model/ode_regression.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.ode_regression import ode_regression_loss
from model.result import LossResult
from pipeline.setup import Setup
from trainer.data import check_trajectories
from trainer.networks import make_player
from trainer.tasks.base import Batch, GeneratorTask, TaskInputs
from utils.config import Config
from utils.datasets import Dataset
from utils.devices import to_device
from utils.draws import Draws, Purpose
from utils.errors import UserError


class OdeInitialisation(GeneratorTask):
    """Regression of the block-causal student on the teacher's trajectories."""

    def __init__(self, given: TaskInputs) -> None:
        config, setup = given.config, given.setup
        if config.denoising_step_list is None:
            raise UserError("ODE initialisation needs a denoising_step_list in the config")
        super().__init__(given)
        self.players = {"generator": make_player(config, "generator", self.generator, ema=True)}
        self.timesteps = torch.cat([setup.levels.tensor(), torch.zeros(1)])  # [S]
        self.context = self._parallel_context()

    @classmethod
    def check_items(cls, config: Config, setup: Setup, data: Dataset) -> None:
        """See `Task`."""
        check_trajectories(config, setup, data)

    def loss(self, player: str, batch: Batch, draws: Draws) -> LossResult:
        """See `Task`."""
        videos = self.batch_split.videos
        counted = self._noisy_frames(draws.for_indices(range(videos)))
        return self._regression(batch, draws, counted * len(draws.indices) / videos)

    def heldout_size(self, prompts: Sequence[str], draws: Draws) -> float:
        """See `Task`: noisy frames."""
        return self._noisy_frames(draws) / len(prompts)

    def heldout_loss(self, batch: Batch, draws: Draws, size: float) -> LossResult:
        """See `Task`."""
        return self._regression(batch, draws, size)

    def _regression(self, batch: Batch, draws: Draws, frames_in_loss: float) -> LossResult:
        device = self.world.device
        trajectory = to_device(batch["trajectory"], device)
        embeddings = self._embedded(batch["prompt"])
        with self.timer.phase("forward"):
            return ode_regression_loss(
                self.generator,
                trajectory,
                to_device(self._levels(draws, trajectory.shape[2]), device),
                to_device(self.timesteps, device),
                self.generator.encode_text(embeddings),
                self.context,
                frames_in_loss=frames_in_loss,
            )

    def phase_flops(self, player: str, draws: Draws) -> dict[str, int]:
        """See `Task`."""
        forward, attention = self._clip_flops(self.generator.config, self.frames)
        return {"forward": forward, "backward": self._backward_flops(forward, attention)}

    def _noisy_frames(self, draws: Draws) -> int:
        """How many frames of these samples are in the loss; at least 1."""
        levels = self._levels(draws, self.frames)
        return max(1, int((levels < len(self.timesteps) - 1).sum()))

    def _levels(self, draws: Draws, frames: int) -> Tensor:
        return self._per_block(draws.integers(Purpose.TIMESTEP, len(self.timesteps), (frames,)))
