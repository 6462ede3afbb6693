"""Self-rollouts: the student's own videos, through the engine of inference, with gradients.

Rolling Forcing (arXiv 2509.25161, Sec. 3.3): gradient in the non-overlapping windows
w = r (mod T); a frame's output is its x_0 in its own such window. Self Forcing (arXiv 2506.08009,
Alg. 1): every block stops at its level r, where its x_0 is its output and its context.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.passes import Plan
from pipeline.rollout import WindowResult
from pipeline.sampling import BlockNoise, Renoise
from pipeline.schedule import BlockLayout, Window
from pipeline.setup import Setup
from utils.draws import Purpose
from utils.errors import UserError
from utils.noise import philox
from wan.dit import DiTConfig, TextContext, WanDiT
from wan.flops import pass_flops, training_flops
from wan.vae import WanVAE


@dataclass(frozen=True)
class RolloutDraw:
    """What all ranks share in one update: a pure function of (seed, update)."""

    schedule: Literal["rolling", "block"]
    num_blocks: int
    exit_levels: tuple[int, ...]  # r of each block; all the same in a rolling rollout

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.schedule}, {self.num_blocks} blocks, r = {sorted(set(self.exit_levels))}"


@dataclass(frozen=True)
class RolloutRecipe:
    """How training draws its rollouts.

    `scored_frames`: latent frames that the scores see. `longest`: latent frames of the longest
    rollout; rollouts of all lengths from the one to the other come equally often.
    """

    seed: int
    num_levels: int
    scored_frames: int
    longest: int
    rolling_probability: float
    last_step_only: bool
    same_step_across_blocks: bool

    def blocks(self, layout: BlockLayout) -> tuple[int, int]:
        """Fewest and most blocks of a rollout: all scored frames, and none too many."""
        fewest = layout.blocks_for(self.scored_frames)
        most = layout.blocks_for(self.longest)
        if layout.start(most) > self.longest:
            most -= 1
        if most < fewest:
            raise UserError(
                f"num_training_frames={self.longest} is too few for {self.scored_frames} scored "
                "frames in whole blocks"
            )
        return fewest, most

    def longest_frames(self, layout: BlockLayout) -> int:
        """Latent frames of the longest rollout, whole blocks."""
        return layout.start(self.blocks(layout)[1])

    def draw(self, layout: BlockLayout, update: int) -> RolloutDraw:
        """Schedule, number of blocks and r of one update."""
        draw = philox(self.seed, Purpose.ROLLOUT_PLAN, (update,))
        rolling = bool(draw.random() < self.rolling_probability)
        fewest, most = self.blocks(layout)
        blocks = int(draw.integers(fewest, most + 1))
        levels = draw.integers(0, self.num_levels, size=blocks)
        if self.last_step_only:
            levels[:] = self.num_levels - 1
        if rolling or self.same_step_across_blocks:
            levels[:] = levels[0]
        return RolloutDraw(
            "rolling" if rolling else "block", blocks, tuple(int(level) for level in levels)
        )


def passes_of(setup: Setup, drawn: RolloutDraw) -> Plan:
    """The passes of a training rollout; blocks of the block schedule stop at their own level."""
    levels = None
    if drawn.schedule == "block":
        levels = tuple(level + 1 for level in drawn.exit_levels)
    return setup.plan(setup.schedule(drawn.num_blocks, kind=drawn.schedule, block_levels=levels))


def is_output(drawn: RolloutDraw, num_levels: int, window: Window) -> bool:
    """Whether this window's x_0 is the output of its blocks."""
    if drawn.schedule == "rolling":
        return window.index % num_levels == drawn.exit_levels[0]
    return window.levels[0] == drawn.exit_levels[window.blocks[-1]]


def output_windows(setup: Setup, drawn: RolloutDraw) -> list[Window]:
    """The windows whose x_0 is the output: they do not overlap and cover all blocks."""
    windows = (own.window for own in passes_of(setup, drawn))
    return [w for w in windows if w is not None and is_output(drawn, setup.levels.num, w)]


def self_rollout(
    setup: Setup,
    dit: WanDiT,
    text: TextContext,
    noise: BlockNoise,
    drawn: RolloutDraw,
    *,
    scored_frames: int,
    grad: bool,
    before_window: Callable[[], None] = lambda: None,
) -> Tensor:
    """The student's video `[B, F, C, h, w]`, float32.

    With `grad`, windows that touch the last `scored_frames` frames carry gradient; all other
    frames have their output too, without. What `before_window` raises ends it.
    """
    layout = setup.layout
    total = layout.start(drawn.num_blocks)
    rollout = setup.rollout(
        dit,
        passes_of(setup, drawn).schedule,
        text=text,
        noise=noise,
        rule=Renoise(setup.levels.tensor(), noise),
        recent_frames=total,  # nothing is evicted: checkpointed windows are read again later
    )
    outputs: dict[int, Tensor] = {}
    while len(outputs) < drawn.num_blocks:
        window = rollout.next_window
        assert window is not None, "every block has its window before the schedule ends"
        chosen = is_output(drawn, setup.levels.num, window)
        touches = layout.start(window.blocks.stop) > total - scored_frames
        before_window()
        result = rollout.step(grad=grad and chosen and touches)
        assert result is not None
        if chosen:
            outputs.update(_by_block(result, layout))
    return torch.cat([outputs[block] for block in range(drawn.num_blocks)], dim=1)


def scored_clip(
    latents: Tensor, vae: WanVAE | None, *, scored: int, block_frames: int
) -> tuple[Tensor, Tensor | None]:
    """The last `scored` frames, and which of them count `[scored]` (None: all).

    A longer video's clip has to look like the start of one: its first frame is replaced by the
    re-encoded image of that moment (one latent frame is one video frame there), and its first
    block, of `block_frames` frames, does not count. Without a VAE the frame is left as it is.
    """
    if latents.shape[1] == scored:
        return latents, None
    counts = torch.ones(scored, dtype=torch.bool, device=latents.device)
    counts[:block_frames] = False
    clip = latents[:, -scored:]
    if vae is None:
        return clip, counts
    with torch.no_grad():
        past = latents[:, : latents.shape[1] - scored + 1].to(vae.dtype)
        image = vae.decode(past)[:, -1:]  # [B, 1, 3, H, W]
        first = vae.encode(image).to(latents.dtype)
    return torch.cat([first, clip[:, 1:]], dim=1), counts


def _by_block(result: WindowResult, layout: BlockLayout) -> dict[int, Tensor]:
    sizes = [layout.frames(block) for block in result.window.blocks]
    return dict(zip(result.window.blocks, result.x0.split(sizes, dim=1), strict=True))


def rollout_flops(
    setup: Setup,
    sizes: DiTConfig,
    drawn: RolloutDraw,
    *,
    scored_frames: int,
    grad: bool,
    checkpointing: bool,
) -> int:
    """Operations of one video's rollout, with its backward passes if `grad`."""
    tokens, layout = setup.shape.tokens_per_frame, setup.layout
    first_scored = layout.start(drawn.num_blocks) - scored_frames
    done, total = 0, 0
    for own in passes_of(setup, drawn):
        forwards = [pass_flops(sizes, part.view, tokens) for part in own.parts]
        window = own.window
        chosen = window is not None and is_output(drawn, setup.levels.num, window)
        if grad and chosen and layout.start(own.parts[-1].blocks.stop) > first_scored:
            forwards[-1] = training_flops(forwards[-1], checkpointing=checkpointing)
        total += sum(forwards)
        done += len(own.parts[-1].blocks) if chosen else 0
        if done == drawn.num_blocks:
            break
    return total
