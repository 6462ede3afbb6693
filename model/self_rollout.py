"""Self-rollouts: the student's own videos, through the engine of inference, with gradients.

Rolling Forcing (arXiv 2509.25161, Sec. 3.3): gradient in the non-overlapping windows
w = r (mod T); a frame's output is its x_0 in its own such window. Self Forcing (arXiv 2506.08009,
Alg. 1): every block stops at its level r, where its x_0 is its output and its context.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.passes import Plan
from pipeline.prefix import by_block
from pipeline.rollout import Rollout, WindowResult
from pipeline.sampling import BlockNoise, Renoise, StepRule
from pipeline.schedule import BlockLayout, Window
from pipeline.setup import Setup
from utils.devices import to_device
from utils.draws import Purpose
from utils.errors import UserError
from utils.noise import philox
from wan.dit import DiTConfig, TextContext, WanDiT
from wan.flops import pass_attention_flops, pass_flops, training_flops
from wan.flow import x0_from_flow
from wan.vae import WanVAE


@dataclass(frozen=True)
class RolloutDraw:
    """What one rollout does: a pure function of (seed, update), and with own levels of the video.

    `exit_levels`: r of each block; all the same in a rolling rollout. `scored_end`: the scored clip
    ends with this many blocks, and what comes after is not run; None: with the last one.
    `given_blocks`: how many of a true clip it goes on from.
    """

    schedule: Literal["rolling", "block"]
    num_blocks: int
    exit_levels: tuple[int, ...]
    scored_end: int | None = None
    given_blocks: int = 0

    @property
    def end(self) -> int:
        """Blocks that get an output."""
        return self.num_blocks if self.scored_end is None else self.scored_end

    def is_output(self, num_levels: int, window: Window) -> bool:
        """Whether this window's x_0 is the output of its blocks."""
        if self.schedule == "rolling":
            return window.index % num_levels == self.exit_levels[0]
        return window.levels[0] == self.exit_levels[window.blocks[-1]]


@dataclass(frozen=True)
class BatchDraw:
    """The rollouts of a batch that run as one, with an r of its own for each video.

    `rows` are those of the batch, which differ in their exit levels alone. Every pass that one of
    `together` needs is run for all, with gradient where one has it: ranks that share weights have
    to make the same passes.
    """

    rows: tuple[RolloutDraw, ...]
    together: tuple[RolloutDraw, ...]

    @classmethod
    def of(cls, drawn: RolloutDraw) -> "BatchDraw":
        """One r for all."""
        return cls((drawn,), (drawn,))

    @property
    def from_noise(self) -> "BatchDraw":
        """The same without given blocks."""
        rows, together = (
            tuple(replace(drawn, given_blocks=0) for drawn in part)
            for part in (self.rows, self.together)
        )
        return BatchDraw(rows, together)

    @property
    def shared(self) -> RolloutDraw:
        """What all have in common; of the exit levels the highest."""
        levels = zip(*(drawn.exit_levels for drawn in self.together), strict=True)
        return replace(self.together[0], exit_levels=tuple(max(block) for block in levels))

    @property
    def differ(self) -> bool:
        """Whether videos stop at levels of their own."""
        return len(set(self.together)) > 1

    def is_output(self, num_levels: int, window: Window) -> bool:
        """Whether this window's x_0 is the output of its blocks in any of the videos."""
        return any(drawn.is_output(num_levels, window) for drawn in set(self.together))

    def outputs(self, num_levels: int, window: Window) -> list[bool]:
        """The same for each row."""
        return [drawn.is_output(num_levels, window) for drawn in self.rows]


@dataclass(frozen=True)
class RolloutRecipe:
    """How training draws its rollouts.

    `scored_frames`: latent frames that the scores see. `longest`: latent frames of the longest
    rollout. With `scored_clip` "end" rollouts of all lengths from the one to the other come equally
    often and their last frames are scored; with "anywhere" all are of the longest length, and the
    clip lies at any place of them (as in LongLive's streaming tuning, arXiv 2509.22622, Sec. 3.2).
    `true_prefix_probability`: share of the rollouts that go on from the first block of a true clip.
    """

    seed: int
    num_levels: int
    scored_frames: int
    longest: int
    rolling_probability: float
    last_step_only: bool
    same_step_across_blocks: bool
    scored_clip: Literal["end", "anywhere"] = "end"
    same_step_across_videos: bool = True
    true_prefix_probability: float = 0.0

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
        if self.true_prefix_probability and fewest < 2:
            raise UserError(
                f"true_prefix_probability needs more scored frames than the {self.scored_frames} "
                "of the first block"
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
        blocks, end = int(draw.integers(fewest, most + 1)), None
        if self.scored_clip == "anywhere":
            blocks, end = most, blocks
        levels = self._levels(draw, blocks, rolling)
        kind: Literal["rolling", "block"] = "rolling" if rolling else "block"
        given_blocks = int(draw.random() < self.true_prefix_probability)
        return RolloutDraw(kind, blocks, levels, end, given_blocks)

    def draw_batch(
        self, layout: BlockLayout, update: int, rows: Sequence[int], *, alone: bool
    ) -> BatchDraw:
        """The rollouts of the videos `rows` of the global batch; `alone`: no other rank has some.

        Beside those of other ranks every level that may be drawn is run for all, so that all make
        the same passes.
        """
        shared = self.draw(layout, update)
        if self.same_step_across_videos:
            return BatchDraw.of(shared)
        blocks, rolling = shared.num_blocks, shared.schedule == "rolling"

        def own(index: int) -> RolloutDraw:
            draw = philox(self.seed, Purpose.EXIT_LEVEL, (update, index))
            return replace(shared, exit_levels=self._levels(draw, blocks, rolling))

        drawn = tuple(map(own, rows))
        first = self.num_levels - 1 if self.last_step_only else 0
        every = tuple(
            replace(shared, exit_levels=(level,) * blocks)
            for level in range(first, self.num_levels)
        )
        return BatchDraw(drawn, drawn if alone else every)

    def _levels(self, draw: Any, blocks: int, rolling: bool) -> tuple[int, ...]:
        levels = draw.integers(0, self.num_levels, size=blocks)
        if self.last_step_only:
            levels[:] = self.num_levels - 1
        if rolling or self.same_step_across_blocks:
            levels[:] = levels[0]
        return tuple(int(level) for level in levels)


def passes_of(setup: Setup, drawn: RolloutDraw) -> Plan:
    """The passes of a training rollout; blocks of the block schedule stop at their own level."""
    levels = None
    if drawn.schedule == "block":
        levels = tuple(level + 1 for level in drawn.exit_levels)
    return setup.plan(
        setup.schedule(
            drawn.num_blocks, drawn.given_blocks, kind=drawn.schedule, block_levels=levels
        )
    )


def output_windows(setup: Setup, drawn: RolloutDraw) -> list[Window]:
    """The windows whose x_0 is the output: they do not overlap, and cover what is not given."""
    windows = (own.window for own in passes_of(setup, drawn))
    return [w for w in windows if w is not None and drawn.is_output(setup.levels.num, w)]


def self_rollout(
    setup: Setup,
    dit: WanDiT,
    text: TextContext,
    noise: BlockNoise,
    drawn: RolloutDraw | BatchDraw,
    *,
    scored_frames: int,
    grad: bool,
    replayed: bool = False,
    prefix: Tensor | None = None,
    before_window: Callable[[], None] = lambda: None,
) -> Tensor:
    """The student's video `[B, F, C, h, w]` up to the end of the scored clip, float32.

    `prefix` `[B, n, C, h, w]`: clean latents of the blocks that are given, its first frames;
    ValueError if it holds more or fewer than were drawn.

    With `grad`, windows that touch the last `scored_frames` of these frames carry gradient; all
    others have their output too, without. A graph of all of them waits for the backward pass, with
    a cache of all frames; `replayed`, the graph is made in the backward pass, one window at a time
    (see `_Replayed`), so memory does not grow with the video. The gradients are the same. What
    `before_window` raises ends it.
    """
    course = _Course(setup, _batch(drawn), scored_frames, prefix, before_window)
    if (held := len(course.prefix_blocks)) != course.drawn.given_blocks:
        raise ValueError(f"{held} blocks are given, not {course.drawn.given_blocks}")
    if grad and replayed:
        anchor = torch.zeros((), requires_grad=True)  # the weights are no inputs of the function
        video: Tensor = _Replayed.apply(course, dit, noise, anchor, *text.keys, *text.values)
        return video
    # With a graph nothing is evicted: checkpointed windows are read again later.
    rollout = course.open(dit, text, noise, keeps_all=grad)
    outputs: dict[int, Tensor] = {}
    for result in course.results(rollout, grad=grad):
        course.add(result, outputs)
    return course.video(outputs)


def _batch(drawn: RolloutDraw | BatchDraw) -> BatchDraw:
    return drawn if isinstance(drawn, BatchDraw) else BatchDraw.of(drawn)


@dataclass(frozen=True)
class _Course:
    """A training rollout: its passes, and the windows that give an output or carry gradient."""

    setup: Setup
    batch: BatchDraw
    scored_frames: int
    prefix: Tensor | None = None
    before_window: Callable[[], None] = lambda: None

    @cached_property
    def drawn(self) -> RolloutDraw:
        """What all videos of the batch have in common."""
        return self.batch.shared

    @cached_property
    def plan(self) -> Plan:
        """All passes; those behind the last output are not run."""
        return passes_of(self.setup, self.drawn)

    @cached_property
    def outputs(self) -> dict[int, Window]:
        """By number, the windows that give the output of some block of some video."""
        windows = (w for w in self.plan.windows() if w.first_block < self.drawn.end)
        return {w.index: w for w in windows if self.batch.is_output(self.setup.levels.num, w)}

    @cached_property
    def carriers(self) -> frozenset[int]:
        """Numbers of those that touch the scored frames: they carry gradient in training."""
        layout = self.setup.layout
        first = layout.start(self.drawn.end) - self.scored_frames
        return frozenset(n for n, w in self.outputs.items() if layout.start(w.blocks.stop) > first)

    def open(
        self, dit: WanDiT, text: TextContext, noise: BlockNoise, *, keeps_all: bool
    ) -> Rollout:
        """The rollout at its start, with a cache of what passes look back at, or of all frames."""
        rule: StepRule = Renoise(self.setup.levels.tensor(), noise)
        if self.batch.differ and self.drawn.schedule == "block":
            rule = _StopEach(rule, [row.exit_levels for row in self.batch.rows])
        return self.setup.rollout(
            dit,
            self.plan.schedule,
            text=text,
            noise=noise,
            rule=rule,
            recent_frames=self.setup.layout.start(self.drawn.end) if keeps_all else None,
            evicts=not keeps_all,
            prefix=self.prefix_blocks,
        )

    @property
    def prefix_blocks(self) -> list[Tensor]:
        """Clean latents of the given blocks, one by one."""
        return [] if self.prefix is None else by_block(self.prefix, self.setup.layout)

    def results(
        self, rollout: Rollout, *, grad: bool = False, before: int | None = None
    ) -> Iterator[WindowResult]:
        """What the output windows give, up to the last one or to those `before` a number."""
        end = max(self.outputs) + 1 if before is None else before
        while (window := rollout.next_window) is not None and window.index < end:
            self.before_window()
            result = rollout.step(grad=grad and window.index in self.carriers)
            assert result is not None
            if window.index in self.outputs:
                yield result

    def add(self, result: WindowResult, outputs: dict[int, Tensor]) -> None:
        """Take the outputs of a window, by block; of the rows that have theirs in it."""
        mask = self.rows(result)
        layout, blocks = self.setup.layout, result.window.blocks
        pieces = result.x0.split([layout.frames(block) for block in blocks], dim=1)
        for block, x0 in zip(blocks, pieces, strict=True):
            kept = outputs.get(block, torch.zeros((), device=x0.device, dtype=x0.dtype))
            outputs[block] = x0 if mask is None else torch.where(mask, x0, kept)

    def rows(self, result: WindowResult) -> Tensor | None:
        """Which videos have their output in a window, `[B, 1, 1, 1, 1]`; None: all."""
        found = self.batch.outputs(self.setup.levels.num, result.window)
        if all(found):
            return None
        return to_device(torch.tensor(found), result.x0.device).view(-1, 1, 1, 1, 1)

    def video(self, outputs: Mapping[int, Tensor]) -> Tensor:
        """`[B, F, C, h, w]` of the given blocks and of outputs by block."""
        made = [outputs[block] for block in range(self.drawn.given_blocks, self.drawn.end)]
        return torch.cat([*self.prefix_blocks, *made], dim=1)


class _Replayed(torch.autograd.Function):
    """A rollout whose graph is made in the backward pass, window by window.

    Forward, it runs without a graph and keeps where it stood before its first window with gradient.
    Backward, it goes on from there; each window that carries gradient is differentiated on its own,
    with its share of the gradient of the video, and its graph is gone before the next one. That is
    exact, for windows are independent given the context, which carries no gradient. It costs the
    scored part of the rollout once more, and a second cache meanwhile. Sharded networks reduce
    their gradients window by window, in fp32; of one graph autograd sums them before, in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, course: _Course, dit: WanDiT, noise: BlockNoise, anchor: Tensor, *text: Tensor
    ) -> Tensor:
        """The video; see `self_rollout`."""
        rollout = course.open(dit, _text(text), noise, keeps_all=False)
        outputs: dict[int, Tensor] = {}
        for result in course.results(rollout, before=min(course.carriers)):
            course.add(result, outputs)
        ctx.state = rollout.state_dict() if rollout.cache.finished else None
        for result in course.results(rollout):
            course.add(result, outputs)
        ctx.course, ctx.dit, ctx.noise = course, dit, noise
        ctx.save_for_backward(*text)
        return course.video(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the text's keys and values; the weights get theirs on the way."""
        course: _Course = ctx.course
        layout, needed = course.setup.layout, ctx.needs_input_grad[4:]
        pairs = zip(ctx.saved_tensors, needed, strict=True)
        text = [tensor.detach().requires_grad_(wanted) for tensor, wanted in pairs]
        rollout = course.open(ctx.dit, _text(text), ctx.noise, keeps_all=False)
        if ctx.state is not None:
            rollout.load_state_dict(ctx.state)
            ctx.state = None
        unscored = layout.start(course.drawn.num_blocks) - gradient.shape[1]
        gradient = F.pad(gradient, (0, 0) * 3 + (0, unscored))
        for result in course.results(rollout, grad=True):
            if result.window.index in course.carriers:
                blocks, mask = result.window.blocks, course.rows(result)
                share = gradient[:, layout.start(blocks.start) : layout.start(blocks.stop)]
                result.x0.backward(share if mask is None else torch.where(mask, share, 0.0))
        return None, None, None, None, *(tensor.grad for tensor in text)


def _text(tensors: Sequence[Tensor]) -> TextContext:
    half = len(tensors) // 2
    return TextContext(tuple(tensors[:half]), tuple(tensors[half:]))


class _StopEach:
    """A step rule under which every row of a batch stops at a level of its own in each block."""

    def __init__(self, rule: StepRule, levels: Sequence[Sequence[int]]) -> None:
        """`levels`: for each row, those of its blocks."""
        self.rule = rule
        self.timesteps = rule.timesteps
        self.levels = torch.tensor(levels)  # [B, blocks]
        self.remembered: dict[int, Tensor] = {}

    def advance(self, block: int, level: int, noisy: Tensor, flow: Tensor, *, last: bool) -> Tensor:
        """See `StepRule`: rows that stopped before go on beside the others, and are put aside."""
        stops = to_device(self.levels[:, block] == level, noisy.device).view(-1, 1, 1, 1, 1)
        clean = x0_from_flow(noisy, flow, self.timesteps[level])
        self.remembered[block] = torch.where(stops, clean, self.remembered.get(block, clean))
        if last:
            return self.remembered.pop(block)
        return self.rule.advance(block, level, noisy, flow, last=False)

    def state_dict(self) -> dict[int, Any]:
        """See `StepRule`."""
        return {block: stopped.clone() for block, stopped in self.remembered.items()}

    def load_state_dict(self, state: Mapping[int, Any], device: torch.device) -> None:
        """See `StepRule`."""
        self.remembered = {block: stopped.to(device, copy=True) for block, stopped in state.items()}


def scored_clip(
    latents: Tensor, vae: WanVAE | None, *, scored: int, block_frames: int, given_frames: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The last `scored` frames, and which of them count `[scored]` (None: all).

    The first `given_frames` of the video are true and do not count.

    A longer video's clip has to look like the start of one: its first frame is replaced by the
    re-encoded image of that moment (one latent frame is one video frame there), and its first
    block, of `block_frames` frames, does not count. Without a VAE the frame is left as it is.
    """
    before = latents.shape[1] - scored
    if not before and not given_frames:
        return latents, None
    counts = torch.ones(scored, dtype=torch.bool, device=latents.device)
    counts[: max(block_frames if before else 0, given_frames - before)] = False
    if not before:
        return latents, counts
    clip = latents[:, -scored:]
    if vae is None:
        return clip, counts
    with torch.no_grad():
        past = latents[:, : before + 1].to(vae.dtype)
        first = vae.encode(vae.decode_last(past)).to(latents.dtype)
    return torch.cat([first, clip[:, 1:]], dim=1), counts


def rollout_flops(
    setup: Setup,
    sizes: DiTConfig,
    drawn: RolloutDraw | BatchDraw,
    *,
    scored_frames: int,
    grad: bool,
    checkpointing: bool,
    selective: bool = False,
    replayed: bool = False,
) -> int:
    """Operations of one video's rollout, with its backward passes if `grad`."""
    course, tokens = _Course(setup, _batch(drawn), scored_frames), setup.shape.tokens_per_frame
    passes, last = [], max(course.outputs)
    for own in course.plan:
        passes.append(own)
        if own.window is not None and own.window.index == last:
            break
    forwards = [[pass_flops(sizes, part.view, tokens) for part in own.parts] for own in passes]
    total = sum(map(sum, forwards))
    if not grad:
        return total
    numbers = [-1 if own.window is None else own.window.index for own in passes]
    for number, own, parts in zip(numbers, passes, forwards, strict=True):
        if number in course.carriers:
            kept = pass_attention_flops(sizes, own.parts[-1].view, tokens) if selective else 0
            whole = training_flops(parts[-1], checkpointing=checkpointing, kept=kept)
            total += whole - parts[-1]
    first = numbers.index(min(course.carriers))  # a replay begins behind the window before it
    while first > 0 and numbers[first - 1] < 0:
        first -= 1
    if all(own.stores is None for own in passes[:first]):
        first = 0
    return total + (sum(map(sum, forwards[first:])) if replayed else 0)
