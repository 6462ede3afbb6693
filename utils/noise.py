"""Counter-based noise: a pure function of what it is for, the same on every device.

`sample` is the index among one prompt's samples, never the batch row; `level` is the level that
the noise brings a block to (0 = its first noise; T, one past the last, re-noises the context). So
a video depends on its prompt and seed alone, whatever the batch, the ranks or the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

MASK_64 = 2**64 - 1


class NoiseSource(Protocol):
    """Standard normal noise of one block."""

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        """Noise `[frames of the block, C, H, W]`, float32, on the CPU."""
        ...


def philox(seed: int, purpose: int = 0, counter: Sequence[int] = ()) -> np.random.Generator:
    """A generator that is a pure function of (seed, purpose, counter); up to three counters.

    Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with
    (seed, purpose) as the key. The lowest counter word is the generator's own.
    """
    words = [0, *counter, 0, 0, 0][:4]
    key = [seed & MASK_64, purpose & MASK_64]
    return np.random.Generator(
        np.random.Philox(
            key=np.array(key, dtype=np.uint64),
            counter=np.array([word & MASK_64 for word in words], dtype=np.uint64),
        )
    )


@dataclass(frozen=True)
class CounterNoise:
    """Noise of one seed for blocks of latents `[C, H, W]` per frame.

    `first_block_frames` differs from `block_frames` where the first frame is a block of its own.
    """

    seed: int
    latent: tuple[int, int, int]
    block_frames: int
    first_block_frames: int | None = None

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        """See `NoiseSource`."""
        frames = self.block_frames
        if block == 0 and self.first_block_frames is not None:
            frames = self.first_block_frames
        generator = philox(self.seed, counter=(level, block, sample))
        return torch.from_numpy(generator.standard_normal((frames, *self.latent), dtype=np.float32))


@dataclass(frozen=True)
class RecordedNoise:
    """Given noise: `initial` `[B, F, C, H, W]` and `renoise` `[blocks, T-1, B, f, C, H, W]`.

    Batch rows are addressed as samples: row b of the batch is `sample` b. Of a block that is
    shorter than f (an independent first frame) the first frames of `renoise` are taken.
    """

    initial: Tensor
    renoise: Tensor
    block_starts: Sequence[int]

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        """See `NoiseSource`."""
        start, end = self.block_starts[block], self.block_starts[block + 1]
        if level > self.renoise.shape[1]:
            raise ValueError(
                f"the given noise ends at level {self.renoise.shape[1]}, but level {level} is "
                "asked for (context_noise above 0 needs one more); use a seed instead"
            )
        if level > 0:
            return self.renoise[block, level - 1, sample, : end - start].float().cpu()
        return self.initial[sample, start:end].float().cpu()
