"""The gate of what is not exact: how far float8 and such bring a video from the exact one.

Both are made from the same seed and prompts, one after the other, and compared block by block. An
error goes on in what comes after it, so later blocks differ by more than was lost in them: what is
lost shows in the first window, where nothing has gone before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.prefix import by_block
from pipeline.setup import Setup
from pipeline.text_to_video import VideoPipeline
from utils.config import config_of
from utils.errors import UserError

NOT_EXACT = {"linear_dtype": "auto", "kv_cache_dtype": "auto", "vae_dtype": "auto"}
"""Keys that trade exactness for memory or speed, and their exact values."""
BLOCKS = 8
SAME = 100.0  # decibels that stand for equal frames


class Limits(NamedTuple):
    """The most relative error of the first window, the least PSNR of all frames, as a mean."""

    error: float = 0.10
    decibels: float = 25.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Made:
    """What one pipeline made: the velocity of the first window, clean latents, video in [-1, 1]."""

    first: Tensor
    latents: Tensor
    video: Tensor


@dataclass(frozen=True)
class Quality:
    """How far a video is from the exact one, of all prompts together.

    `first_window`: relative error of what the network says first, |x - exact| / |exact|.
    `latents`: the same of every block's clean latents. `decibels`: PSNR of every block's frames.
    """

    first_window: float
    latents: tuple[float, ...]
    decibels: tuple[float, ...]
    limits: Limits = DEFAULT_LIMITS

    def faults(self) -> list[str]:
        """Why this is not good enough, in words; none where it is."""
        mean = sum(self.decibels) / len(self.decibels)
        found = []
        if not self.first_window <= self.limits.error:
            error = f"{self.first_window:.3f}, more than {self.limits.error:g}"
            found.append(f"the first window's error is {error}")
        if not mean >= self.limits.decibels:
            found.append(f"the frames are at {mean:.1f} dB, below {self.limits.decibels:g}")
        return found

    def table(self) -> str:
        """The figures as Markdown, and what follows from them."""
        pairs = enumerate(zip(self.latents, self.decibels, strict=True))
        rows = [f"| {block} | {error:.4f} | {found:.1f} |" for block, (error, found) in pairs]
        head = ["| block | latents, relative error | frames, dB |", "|---:|---:|---:|"]
        faults = "; ".join(self.faults())
        verdict = f"not good enough: {faults}" if faults else "good enough"
        return "\n".join([f"first window: {self.first_window:.4f}", "", *head, *rows, "", verdict])

    def record(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {**asdict(self), "faults": self.faults()}


def exact(setup: Setup) -> Setup:
    """The same without what is not exact; UserError if there is nothing of that kind."""
    if all(setup.resolved[name] == value for name, value in NOT_EXACT.items()):
        names = ", ".join(NOT_EXACT)
        raise UserError(f"this config is exact already: set one of {names}, as linear_dtype=float8")
    return setup.under(config_of({**setup.resolved, **NOT_EXACT}, "the exact setup"))


def measure(
    setup: Setup,
    load: Callable[[Setup], VideoPipeline],
    encode: Callable[[VideoPipeline], Sequence[Tensor]],
    *,
    blocks: int = BLOCKS,
    seed: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Quality:
    """Quality of what `setup` makes.

    `load` gives a pipeline of a setup, always of the same weights; two are never in memory at once.
    `encode` gives the text embeddings `[1, L, dim]` of the videos.
    """
    reference = exact(setup)
    pipe = load(reference)
    texts = encode(pipe)
    wanted = [make(pipe, text, blocks, seed) for text in texts]
    del pipe
    pipe = load(setup)
    found = [make(pipe, text, blocks, seed) for text in texts]
    return compare(found, wanted, pipe, limits)


@torch.no_grad()
def make(pipe: VideoPipeline, text: Tensor, blocks: int, seed: int | None) -> Made:
    """One video of text embeddings `[1, L, dim]`, with what it came from; all on the CPU."""
    said: list[Tensor] = []
    hook = pipe.dit.register_forward_hook(lambda dit, inputs, output: said.append(output))
    try:
        latents = pipe.generate_latents(text, pipe.layout.start(blocks), seed=seed)
    finally:
        hook.remove()
    decoder = pipe.vae.streaming_decoder()
    video = torch.cat(
        [decoder.decode(part).float().cpu() for part in by_block(latents, pipe.layout)], dim=1
    )
    return Made(said[0].float().cpu(), latents.cpu(), video)


def compare(
    found: Sequence[Made],
    wanted: Sequence[Made],
    pipe: VideoPipeline,
    limits: Limits = DEFAULT_LIMITS,
) -> Quality:
    """What was found against what was wanted, prompt by prompt."""
    blocks = pipe.layout.blocks_for(wanted[0].latents.shape[1])
    latents = [
        [
            torch.cat(parts)
            for parts in zip(*(by_block(m.latents, pipe.layout) for m in made), strict=True)
        ]
        for made in (found, wanted)
    ]
    sizes = [pipe.setup.block_video_frames(block) for block in range(blocks)]
    video = [torch.cat([m.video for m in made]).split(sizes, dim=1) for made in (found, wanted)]
    return Quality(
        _error(*(torch.cat([m.first for m in made]) for made in (found, wanted))),
        tuple(_error(*pair) for pair in zip(*latents, strict=True)),
        tuple(_decibels(*pair) for pair in zip(*video, strict=True)),
        limits,
    )


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def _decibels(found: Tensor, wanted: Tensor) -> float:
    """PSNR of video in [-1, 1]."""
    error = ((found - wanted) / 2).square().mean()
    return min(SAME, -10 * error.log10().item()) if error > 0 else SAME
