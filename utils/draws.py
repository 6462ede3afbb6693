"""Random numbers of training: functions of (seed, update, index in the global batch, purpose).

So a sample's draws do not depend on its rank, its micro-batch, or on what was drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from utils.noise import philox

ATTEMPT = 2**44  # between the numbers of the first and the second try of an update: no run has more


class Purpose(IntEnum):
    """What a draw is for: part of the generator's key, so the numbers are fixed for ever."""

    ROLLOUT_PLAN = 1
    ROLLOUT_NOISE = 2
    SCORE_TIMESTEP = 3
    SCORE_NOISE = 4
    TIMESTEP = 5
    NOISE = 6
    CLEAN_TIMESTEP = 7
    CLEAN_NOISE = 8
    PROMPT_DROPOUT = 9
    CLIP_START = 10
    DATA_ORDER = 11
    EXIT_LEVEL = 12
    GUARD_LEVEL = 13
    GUARD_NOISE = 14
    PROMPT_CHANGE = 15


@dataclass(frozen=True)
class Draws:
    """Draws of one update for the samples `indices` of the global batch."""

    seed: int
    update: int
    indices: tuple[int, ...]

    def normal(self, purpose: Purpose, shape: Sequence[int]) -> Tensor:
        """Standard normal `[B, *shape]`, float32."""
        rows = [g.standard_normal(tuple(shape), dtype=np.float32) for g in self._each(purpose)]
        return torch.from_numpy(np.stack(rows))

    def uniform(self, purpose: Purpose, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1): `[B, *shape]`, float32."""
        return torch.from_numpy(
            np.stack([g.random(tuple(shape), dtype=np.float32) for g in self._each(purpose)])
        )

    def integers(self, purpose: Purpose, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Integers in [0, high): `[B, *shape]`, int64."""
        return torch.from_numpy(
            np.stack([g.integers(0, high, tuple(shape)) for g in self._each(purpose)])
        )

    def for_indices(self, indices: Sequence[int]) -> "Draws":
        """The same update's draws for other samples of the global batch."""
        return Draws(self.seed, self.update, tuple(indices))

    def _each(self, purpose: Purpose) -> list[np.random.Generator]:
        return [philox(self.seed, purpose, (self.update, index)) for index in self.indices]


@dataclass(frozen=True)
class TrainingNoise:
    """Rollout noise of one update; `sample` is the index in the global batch (a NoiseSource)."""

    seed: int
    update: int
    latent: tuple[int, int, int]
    block_frames: int
    first_block_frames: int

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        """Noise `[frames of the block, C, H, W]`, float32, on the CPU."""
        frames = self.first_block_frames if block == 0 else self.block_frames
        counter = (self.update, sample, (block << 32) | level)
        generator = philox(self.seed, Purpose.ROLLOUT_NOISE, counter)
        return torch.from_numpy(generator.standard_normal((frames, *self.latent), dtype=np.float32))
