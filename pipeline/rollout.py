"""The one rollout engine: a plan of passes run from noise to latents, window by window.

Inference, self-rollouts in training, prompt changes and continuation are callers of `Rollout.step`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.passes import Part, Pass, Plan
from pipeline.sampling import BlockNoise, StepRule
from pipeline.schedule import BlockLayout, Window
from utils.devices import to_device
from wan.context import AttentionContext, CachedContext, SplitContext
from wan.dit import TextContext, WanDiT
from wan.flow import add_noise, x0_from_flow
from wan.kv_cache import ContextPolicy, KVCache

ContextWrapper = Callable[[CachedContext, Window | None], AttentionContext]
"""Puts another context around that of a pass: of a window, or (None) of a clean pass."""


STATE_KEYS = frozenset(
    {
        *("index", "plan", "merged", "in_flight", "unwritten", "timesteps", "policy"),
        *("context_noise", "guidance_scale", "rule", "cache"),
    }
)


@dataclass(frozen=True)
class WindowResult:
    """What one window pass gave.

    `x0`: the prediction for every frame of the window `[B, q, C, H, W]`.
    `finished`: clean latents `[B, f, C, H, W]` of the blocks that left the window, by block.
    """

    window: Window
    x0: Tensor
    finished: dict[int, Tensor]


class Rollout:
    """Runs a plan of passes; yields one `WindowResult` per `step`.

    A finished block is handed out before its clean pass runs, and where no later pass reads it that
    never runs (see `Plan`). Window passes only read the cache. `text` may be replaced between
    steps, and so may `wrap_context`, through which every part's attention goes where it is set.
    """

    def __init__(
        self,
        dit: WanDiT,
        plan: Plan,
        *,
        cache: KVCache,
        grid: tuple[int, int],
        rule: StepRule,
        noise: BlockNoise,
        text: TextContext,
        guidance_scale: float | None = None,
        context_noise: float = 0.0,
        prefix: Sequence[Tensor] = (),
    ) -> None:
        """`prefix`: clean latents of the blocks that the plan stores before its first window.

        With `guidance_scale` g the text (and the cache) hold the conditional rows first, then the
        unconditional ones, and v = v_uncond + g (v_cond - v_uncond).
        """
        self.dit = dit
        self.plan = plan
        self.cache = cache
        self.grid = grid
        self.rule = rule
        self.noise = noise
        self.text = text
        self.guidance_scale = guidance_scale
        self.context_noise = context_noise
        self.wrap_context: ContextWrapper | None = None
        self._timesteps = to_device(rule.timesteps, cache.device)
        if dit.is_compiled:
            cache.share_graphs()
        self.index = 0  # of the next pass
        self._in_flight: dict[int, Tensor] = {}
        self._unwritten: dict[int, Tensor] = dict(enumerate(prefix))

    @property
    def layout(self) -> BlockLayout:
        """How latent frames fall into blocks."""
        return self.plan.layout

    @property
    def next_window(self) -> Window | None:
        """The window that the next step runs; None when the plan has ended."""
        return next(self.coming_windows(), None)

    @property
    def next_block(self) -> int | None:
        """The block that is finished next; None when the plan has ended."""
        window = self.next_window
        return None if window is None else window.first_block

    def coming_windows(self) -> Iterator[Window]:
        """The windows that are still to run, in order."""
        return self.plan.windows(self.index)

    def step(self, *, grad: bool = False) -> WindowResult | None:
        """Run passes up to the next window, that one with gradient if `grad`.

        None when the plan has ended. A clean pass has no gradient: it runs alone where it would
        share its forward with such a window.
        """
        while (coming := self.plan.at(self.index)) is not None:
            result = self._run(self._parted(coming) if grad else coming, grad=grad)
            self.noise.draw_ahead(self.plan.schedule.num_blocks)
            self.index += 1
            if result is not None:
                return result
        return None

    @torch.no_grad()
    def rehearse(self) -> None:
        """Run the passes of a steady block on noise, so that a compiled network has its graphs.

        Before the first step; what the cache holds then is no past.
        """
        for own in self.plan.steady_passes():
            if own.parts:
                self.cache.seek(self.layout.start(own.parts[0].blocks[0]))
                inputs = [torch.cat([self.noise(b, 0) for b in p.blocks], dim=1) for p in own.parts]
                self._flows(own.parts, [(x, torch.zeros_like(x[:, :, 0, 0, 0])) for x in inputs])
        self.cache.seek(0)

    # --- changes of direction -------------------------------------------------------------------

    @torch.no_grad()
    def recache(self, rows: Sequence[int] | None = None) -> None:
        """Give what is stored the keys and values that its clean passes would have under `text`.

        Clean passes in order over the stored clean latents, with their true frame numbers, sink
        included. What a pass once saw of frames that are no longer stored is left out; an averaged
        sink begins again with the first frames.
        `rows`: of the text's batch; those of the others stay as they are. By default all.
        """
        cache, batch, finished = self.cache, len(self.noise.samples), self.cache.finished
        parts = list(self.plan.recache(finished))
        frames = tuple(f for first, part in parts for f in range(first, first + part.frames))
        if not frames:
            return
        stored = cache.latents(frames)[:batch].split([part.frames for _, part in parts], dim=1)
        others = [] if rows is None else [i for i in range(cache.batch) if i % batch not in rows]
        kept = cache.rows(others)
        try:
            for (first, part), clean in zip(parts, stored, strict=True):
                block = part.blocks[0]
                begin = self.layout.start(block) - self.layout.start(self.plan.origin)
                cache.seek(first, keep_sink=True)
                self._flows([part], [self._noised_clean(block, clean, first - begin)])
                cache.commit(self._rows(clean))
        finally:
            cache.seek(finished)
            cache.put_rows(others, kept)

    def restart(self, *, scene: bool = False) -> None:
        """Blocks in flight start again from their noise; of a new `scene`, without a past.

        What is finished stays finished. Raises ValueError when the plan has ended.
        """
        block = self.next_block
        if block is None:
            raise ValueError("the plan has ended: nothing is left to start again")
        if scene:
            self._unwritten.clear()
            self.cache.seek(0)
        stored = min(self._unwritten, default=block)
        self.plan = self.plan.restarted(block, stored=stored, scene=scene)
        self.index = 0
        self._in_flight.clear()
        self.rule.load_state_dict({}, self.cache.device)

    def recent_latents(self, frames: int) -> Tensor:
        """The newest clean latents that are held, at most `frames`: `[B, n, C, h, w]`."""
        finished, batch = self.cache.finished, len(self.noise.samples)
        room = range(max(0, finished - frames), finished)
        held = tuple(frame for frame in room if self.cache.holds(frame))
        newest = [self.cache.latents(held)[:batch]]
        newest += [self._unwritten[block] for block in sorted(self._unwritten)]
        return torch.cat(newest, dim=1)[:, -frames:]

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self, *, latents_only: bool = False) -> dict[str, Any]:
        """Everything that the next step depends on, but the text and the noise.

        With `latents_only` keys and values are left out, to be made anew by `recache`, and the rest
        is on the CPU.
        """

        def copied(blocks: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {
                block: x.to("cpu" if latents_only else x.device, copy=True)
                for block, x in blocks.items()
            }

        plan = self.plan
        return {
            "index": self.index,
            "plan": [plan.schedule.first_block, plan.origin, plan.stored],
            "merged": plan.merged,
            "in_flight": copied(self._in_flight),
            "unwritten": copied(self._unwritten),
            "timesteps": self.rule.timesteps.tolist(),
            "policy": asdict(plan.policy),
            "context_noise": self.context_noise,
            "guidance_scale": self.guidance_scale,
            "rule": self.rule.state_dict(),
            "cache": self.cache.latents_state() if latents_only else self.cache.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another rollout of the same plan and sizes stood.

        Of a state of latents only the keys and values are made anew, under `text`.

        Raises:
            ValueError: it was another one; nothing has changed then.
        """
        device = self.cache.device
        self.plan = self.check_state(state)
        if "keys" in state["cache"]:
            self.cache.load_state_dict(state["cache"])
        else:
            self.cache.load_latents_state(state["cache"])
        self.rule.load_state_dict(state["rule"], device)
        self.index = state["index"]
        self._in_flight = {block: x.to(device) for block, x in state["in_flight"].items()}
        self._unwritten = {block: x.to(device) for block, x in state["unwritten"].items()}
        if "keys" not in state["cache"]:
            self.recache()

    def check_state(self, state: Mapping[str, Any]) -> Plan:
        """The plan of a state; ValueError, naming the first difference, if it is of another one."""
        if not isinstance(state, Mapping) or not state.keys() >= STATE_KEYS:
            raise ValueError("this is no state of a rollout: give what state_dict returned")
        pairs = {
            "levels": (state["timesteps"], self.rule.timesteps.tolist()),
            "the policy": (asdict(ContextPolicy(**state["policy"])), asdict(self.plan.policy)),
            "merge_clean_pass": (state["merged"], self.plan.merged),
            "context_noise": (state["context_noise"], self.context_noise),
            "guidance_scale": (state["guidance_scale"], self.guidance_scale),
        }
        for what, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise ValueError(f"this state was made with {what} {theirs}, not {ours}")
        first, origin, stored = state["plan"]
        plan = replace(
            self.plan,
            schedule=replace(self.plan.schedule, first_block=first),
            origin=origin,
            stored=stored,
        )
        window = next(plan.windows(state["index"]), None)
        needed = [block for block, level in window or () if level > 0]
        if sorted(state["in_flight"]) != needed:
            raise ValueError(
                f"this state has the blocks {sorted(state['in_flight'])} in flight, not {needed}: "
                "it was made with another schedule or length"
            )
        for block, x in (*state["in_flight"].items(), *state["unwritten"].items()):
            expected = list(self.noise(block, 0).shape)
            if list(x.shape) != expected:
                raise ValueError(f"block {block} of this state is {list(x.shape)}, not {expected}")
        self.cache.check_state(state["cache"])
        return plan

    def _parted(self, own: Pass) -> Pass:
        """A pass without the clean part before its window, which has run once this returns."""
        if len(own.parts) < 2:
            return own
        clean, window = own.parts
        if own.stores in self._unwritten:  # not so where this pass is run again
            self._run(replace(own, parts=(clean,)), grad=False)
        return replace(own, parts=(window,), stores=None)

    def _run(self, own: Pass, *, grad: bool) -> WindowResult | None:
        """One pass; what its window gave, if it has one."""
        window = own.window
        inputs = [self._input(part) for part in own.parts]
        with torch.set_grad_enabled(grad and window is not None):
            flows = self._flows(own.parts, inputs)
            if window is not None:
                noisy, timesteps = inputs[-1]
                x0 = x0_from_flow(noisy, flows[-1], timesteps)
        remembered = dict(self.rule.remembered)
        try:
            moved = {} if window is None else self._advanced(window, noisy, flows[-1].detach())
            if own.stores is not None:
                self.cache.commit(self._rows(self._unwritten[own.stores]))
        except BaseException:  # nothing has changed: the same pass can run again
            self.rule.remembered = remembered
            raise
        if own.stores is not None:
            del self._unwritten[own.stores]
        if window is None:
            return None
        finished = {block: moved.pop(block) for block in self.plan.schedule.finishes(window)}
        self._in_flight = moved
        self._unwritten.update(finished)
        return WindowResult(window, x0, finished)

    def _input(self, part: Part) -> tuple[Tensor, Tensor]:
        """What goes through the network `[B, q, C, H, W]`, and its timesteps `[B, q]`."""
        if part.window is None:
            return self._clean_input(part.blocks[0])
        noisy = [
            self.noise(block, 0) if level == 0 else self._in_flight[block]
            for block, level in part.window
        ]
        times = [
            self._timesteps[level].expand(x.shape[1])
            for x, level in zip(noisy, part.window.levels, strict=True)
        ]
        joined = torch.cat(noisy, dim=1)  # [B, q, C, H, W]
        return joined, torch.cat(times).expand(joined.shape[:2])

    def _clean_input(self, block: int) -> tuple[Tensor, Tensor]:
        return self._noised_clean(block, self._unwritten[block])

    def _noised_clean(self, block: int, clean: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Input of the clean pass of frames of a block, from its frame `offset` on."""
        timesteps = torch.full(clean.shape[:2], float(self.context_noise), device=clean.device)
        if self.context_noise > 0:
            noise = self.noise(block, len(self.rule.timesteps))
            own = noise[:, offset : offset + clean.shape[1]]
            clean = add_noise(clean, own, timesteps)
        return clean, timesteps

    def _flows(
        self, parts: Sequence[Part], inputs: Sequence[tuple[Tensor, Tensor]]
    ) -> Sequence[Tensor]:
        """The generator's one call: the flow of each part, `[B, q, C, H, W]` as its input."""
        if not parts:
            return []
        latents, timesteps = (torch.cat(x, dim=1) for x in zip(*inputs, strict=True))
        flow = self.dit(self._rows(latents), self._rows(timesteps), self.text, self._context(parts))
        if self.guidance_scale is not None:
            cond, uncond = flow.chunk(2)
            flow = uncond + self.guidance_scale * (cond - uncond)
        return flow.split([part.frames for part in parts], dim=1)

    def _context(self, parts: Sequence[Part]) -> AttentionContext:
        """What the parts see; a part behind a clean pass reads what that has just stored."""
        steady = self.plan.is_steady(parts)
        contexts, upcoming = [], 0
        for part in parts:
            cached = CachedContext(
                self.cache,
                part.view,
                self.grid,
                self.dit.config.head_dim,
                write=part.window is None,
                upcoming=upcoming,
                steady=steady,
            )
            upcoming += part.frames if part.window is None else 0
            wrap = self.wrap_context
            contexts.append(cached if wrap is None else wrap(cached, part.window))
        if len(contexts) == 1:
            return contexts[0]
        tokens = self.grid[0] * self.grid[1]
        sizes = [part.frames * tokens for part in parts]
        return SplitContext(list(zip(sizes, contexts, strict=True)))

    def _advanced(self, window: Window, noisy: Tensor, flow: Tensor) -> dict[int, Tensor]:
        """Every block of the window one level on, by block; those that are clean then, too."""
        finishing = self.plan.schedule.finishes(window)
        frames = [self.layout.frames(block) for block in window.blocks]
        pairs = zip(noisy.split(frames, dim=1), flow.split(frames, dim=1), strict=True)
        return {
            block: self.rule.advance(block, level, x, v, last=block in finishing)
            for (block, level), (x, v) in zip(window, pairs, strict=True)
        }

    def _rows(self, x: Tensor) -> Tensor:
        """The network's batch: the rollout's rows, twice where there is guidance."""
        return x if self.guidance_scale is None else torch.cat([x, x])
