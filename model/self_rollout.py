"""Self-rollouts: the student's own videos, through the engine of inference, with gradients.

Rolling Forcing (arXiv 2509.25161, Sec. 3.3): gradient in the non-overlapping windows
w = r (mod T); a frame's output is its x_0 in its own such window. Self Forcing (arXiv 2506.08009,
Alg. 1): every block stops at its level r, where its x_0 is its output and its context.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.components import (
    block_layout,
    context_policy,
    level_timesteps,
    new_cache,
    video_shape,
)
from pipeline.rollout import Rollout, WindowResult
from pipeline.sampling import BlockNoise, Renoise
from pipeline.schedule import BlockLayout, Schedule, Window
from utils.config import Config
from utils.draws import Purpose
from utils.errors import UserError
from utils.noise import philox
from wan.dit import DiTConfig, TextContext, WanDiT
from wan.flops import pass_flops, training_flops
from wan.vae import WanVAE


@dataclass(frozen=True)
class RolloutPlan:
    """What all ranks share in one update: a pure function of (seed, update)."""

    schedule: Literal["rolling", "block"]
    num_blocks: int
    exit_levels: tuple[int, ...]  # r of each block; all the same in a rolling rollout

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.schedule}, {self.num_blocks} blocks, r = {sorted(set(self.exit_levels))}"


def plan_rollout(config: Config, update: int) -> RolloutPlan:
    """Draw schedule, number of blocks and r for one update."""
    draw = philox(config.seed, Purpose.ROLLOUT_PLAN, (update,))
    rolling = bool(draw.random() < config.rolling_probability)
    fewest, most = rollout_blocks(config)
    blocks = int(draw.integers(fewest, most + 1))
    levels = draw.integers(0, config.num_levels, size=blocks)
    if config.last_step_only:
        levels[:] = config.num_levels - 1
    if rolling or config.same_step_across_blocks:
        levels[:] = levels[0]
    return RolloutPlan(
        "rolling" if rolling else "block", blocks, tuple(int(level) for level in levels)
    )


def rollout_blocks(config: Config) -> tuple[int, int]:
    """Fewest and most blocks of a training rollout: all scored frames, and none too many."""
    layout = block_layout(config)
    fewest = layout.blocks_for(scored_frames(config))
    most = layout.blocks_for(config.num_training_frames)
    if layout.start(most) > config.num_training_frames:
        most -= 1
    if most < fewest:
        raise UserError(
            f"num_training_frames={config.num_training_frames} is too few for "
            f"{scored_frames(config)} scored frames in whole blocks"
        )
    return fewest, most


def longest_rollout(config: Config) -> int:
    """Latent frames of the longest training rollout."""
    return block_layout(config).start(rollout_blocks(config)[1])


def output_windows(config: Config, plan: RolloutPlan) -> list[Window]:
    """The windows whose x_0 is the output: they do not overlap and cover all blocks."""
    schedule = _schedule(config, plan)
    return [window for window in schedule if is_output(plan, schedule, window)]


def scored_frames(config: Config) -> int:
    """Latent frames that the scores see: the F of `image_or_video_shape`."""
    return config.image_or_video_shape[1]


def self_rollout(
    config: Config,
    dit: WanDiT,
    text: TextContext,
    noise: BlockNoise,
    plan: RolloutPlan,
    *,
    grad: bool,
) -> Tensor:
    """The student's video `[B, F, C, h, w]`, float32.

    With `grad`, windows that touch the last `scored_frames` frames carry gradient; all other
    frames have their output too, without.
    """
    layout = block_layout(config)
    total = layout.start(plan.num_blocks)
    first_scored = total - scored_frames(config)
    rollout = _engine(config, dit, text, noise, plan, layout)
    outputs: dict[int, Tensor] = {}
    while len(outputs) < plan.num_blocks:
        window = rollout.schedule.window(rollout.index)
        assert window is not None, "every block has its window before the schedule ends"
        chosen = is_output(plan, rollout.schedule, window)
        touches = layout.start(window.blocks[-1] + 1) > first_scored
        result = rollout.step(grad=grad and chosen and touches)
        assert result is not None
        if chosen:
            outputs.update(_by_block(result, layout))
    return torch.cat([outputs[block] for block in range(plan.num_blocks)], dim=1)


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


def _engine(
    config: Config,
    dit: WanDiT,
    text: TextContext,
    noise: BlockNoise,
    plan: RolloutPlan,
    layout: BlockLayout,
) -> Rollout:
    frames = layout.start(plan.num_blocks)
    cache = new_cache(
        config,
        dit.config,
        batch=len(noise.samples),
        dtype=text.keys[0].dtype,
        device=text.keys[0].device,
        recent_frames=frames,  # nothing is evicted: checkpointed windows are read again later
    )
    return Rollout(
        dit,
        schedule=_schedule(config, plan),
        layout=layout,
        policy=context_policy(config),
        cache=cache,
        grid=video_shape(config, dit.config).grid,
        rule=Renoise(level_timesteps(config), noise),
        noise=noise,
        text=text,
        context_noise=config.context_noise,
    )


def _schedule(config: Config, plan: RolloutPlan) -> Schedule:
    if plan.schedule == "rolling":
        return Schedule("rolling", config.num_levels, plan.num_blocks)
    levels = tuple(level + 1 for level in plan.exit_levels)
    return Schedule("block", config.num_levels, plan.num_blocks, block_levels=levels)


def is_output(plan: RolloutPlan, schedule: Schedule, window: Window) -> bool:
    """Whether this window's x_0 is the output of its blocks."""
    if plan.schedule == "rolling":
        return window.index % schedule.num_levels == plan.exit_levels[0]
    return window.levels[0] == plan.exit_levels[window.blocks[-1]]


def _by_block(result: WindowResult, layout: BlockLayout) -> dict[int, Tensor]:
    sizes = [layout.frames(block) for block in result.window.blocks]
    return dict(zip(result.window.blocks, result.x0.split(sizes, dim=1), strict=True))


def rollout_flops(config: Config, sizes: DiTConfig, plan: RolloutPlan, *, grad: bool) -> int:
    """Operations of one video's rollout, with its backward passes if `grad`."""
    layout, policy = block_layout(config), context_policy(config)
    tokens = video_shape(config, sizes).tokens_per_frame
    schedule = _schedule(config, plan)
    first_scored = layout.start(plan.num_blocks) - scored_frames(config)
    finished, done, total = 0, 0, 0
    pending: list[int] = []
    for window in schedule:
        for block in pending:
            frames = layout.frames(block)
            total += pass_flops(sizes, policy.view(finished, frames, clean_pass=True), tokens)
            finished += frames
        frames = sum(layout.frames(block) for block in window.blocks)
        forward = pass_flops(sizes, policy.view(finished, frames), tokens)
        chosen = is_output(plan, schedule, window)
        touches = layout.start(window.blocks[-1] + 1) > first_scored
        with_backward = grad and chosen and touches
        checkpointing = config.gradient_checkpointing
        total += training_flops(forward, checkpointing=checkpointing) if with_backward else forward
        pending = list(schedule.finishes(window))
        done += len(window.blocks) if chosen else 0
        if done == plan.num_blocks:
            break
    return total
