"""Rollouts of tiny random networks from their parts, and a network that keeps a log."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.passes import Plan
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise, Renoise, StepRule
from pipeline.schedule import BlockLayout, Schedule, ScheduleKind
from utils.noise import CounterNoise, NoiseSource
from wan.attention import Backend
from wan.context import CachedContext, SplitContext
from wan.dit import TextContext, WanDiT
from wan.kv_cache import ContextPolicy, KVCache


class NumberedContext:
    """A context of which tests tell apart the layers: `attend` is given the layer's number."""

    steady = False

    def of(self, layer: int) -> "NumberedLayer":
        return NumberedLayer(self, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class NumberedLayer(NamedTuple):
    context: NumberedContext
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        return self.context.attend(self.layer, q, k, v)


class Call(NamedTuple):
    """One forward pass of the network."""

    clean_pass: bool
    past: tuple[int, ...]  # frames finished before it
    latents: Tensor
    timesteps: Tensor


class LoggingDiT:
    """Runs a network and remembers every call."""

    def __init__(self, dit: WanDiT) -> None:
        self.dit = dit
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dit, name)

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextContext,
        context: CachedContext | SplitContext,
    ) -> Tensor:
        first = context.contexts[0] if isinstance(context, SplitContext) else context
        past = tuple(range(first.cache.finished))
        clean_pass = first is context and first.destination is not None
        self.calls.append(Call(clean_pass, past, latents.clone(), timesteps.clone()))
        return self.dit(latents, timesteps, text, context)

    @property
    def clean_passes(self) -> list[Call]:
        return [call for call in self.calls if call.clean_pass]

    @property
    def windows(self) -> list[Call]:
        return [call for call in self.calls if not call.clean_pass]


@dataclass(frozen=True)
class TinyMethod:
    """Schedule and context of a method at a tiny size, with `levels` timesteps."""

    kind: ScheduleKind
    policy: ContextPolicy
    layout: BlockLayout
    timesteps: tuple[float, ...] = (1000.0, 800.0, 500.0)

    @property
    def levels(self) -> int:
        return len(self.timesteps)


def tiny_method(
    name: str, block: int = 2, *, independent_first_frame: bool = False, levels: int = 3
) -> TinyMethod:
    """Rolling Forcing, Self Forcing or Infinite-Forcing for blocks of `block` frames.

    `averaged`: Rolling Forcing with a causal window and an averaged sink.
    """
    timesteps = tuple(1000.0 - 800.0 * level / levels for level in range(levels))
    layout = BlockLayout(block, independent_first_frame)
    rolling = ContextPolicy(block, (levels + 2) * block, "contiguous", clean_pass_sees_sink=False)
    blockwise = {
        "self": ContextPolicy(0, 3 * block, "original"),
        "self with sink": ContextPolicy(1, 3 * block + 1, "original"),
        "infinite": ContextPolicy(1, 3 * block + 1, "contiguous"),
    }
    if name == "averaged":
        rolling = replace(rolling, window_attention="block_causal", sink_ema=0.7)
    if name in ("rolling", "averaged"):
        return TinyMethod("rolling", rolling, layout, timesteps)
    return TinyMethod("block", blockwise[name], layout, timesteps)


LATENT = (16, 4, 6)  # channels, height, width of one latent frame
GRID = (2, 3)


def some_text(dit: WanDiT, rows: Sequence[int] = (0,)) -> Tensor:
    """Embeddings of made-up prompts, one per number: `[B, text_len, text_dim]`."""
    size = (dit.config.text_len, dit.config.text_dim)
    return torch.stack(
        [torch.randn(size, generator=torch.Generator().manual_seed(100 + row)) for row in rows]
    )


def new_rollout(
    dit: WanDiT | LoggingDiT,
    method: TinyMethod,
    num_blocks: int | None,
    *,
    text: Tensor | None = None,
    seed: int = 0,
    source: NoiseSource | None = None,
    prefix: Sequence[Tensor] = (),
    rule: StepRule | None = None,
    rows: int | None = None,
    latent: tuple[int, int, int] = LATENT,
    grid: tuple[int, int] = GRID,
    in_float8: bool = False,
    recent: int | None = None,
    merged: bool = False,
    **options: Any,
) -> Rollout:
    """A rollout from its parts; `rows`: rows of the cache, if not one per prompt.

    `recent`: frames of its ring.
    """
    config, layout = dit.config, method.layout
    text = some_text(dit) if text is None else text
    first = layout.frames(0) if layout.independent_first_frame else None
    source = source or CounterNoise(seed, latent, layout.block_frames, first)
    noise = BlockNoise(source, [0] * (rows or len(text)), "cpu")
    recent = method.policy.stored_capacity(layout.block_frames) if recent is None else recent
    cache = KVCache(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        tokens_per_frame=grid[0] * grid[1],
        latent=latent,
        sink_frames=method.policy.sink_frames,
        recent_frames=recent,
        batch=len(text),
        dtype=next(dit.parameters()).dtype,
        device="cpu",
        in_float8=in_float8,
        sink_ema=method.policy.sink_ema,
        sink_lag=recent - layout.block_frames,
    )
    return Rollout(
        dit,  # type: ignore[arg-type]
        Plan(
            Schedule(method.kind, method.levels, num_blocks, len(prefix)),
            layout,
            method.policy,
            merged=merged,
        ),
        cache=cache,
        grid=grid,
        rule=rule or Renoise(torch.tensor(method.timesteps), noise),
        noise=noise,
        text=dit.encode_text(text),
        prefix=prefix,
        **options,
    )


def run(rollout: Rollout) -> dict[int, Tensor]:
    """All finished blocks of a bounded rollout, by block."""
    blocks: dict[int, Tensor] = {}
    while (result := rollout.step()) is not None:
        assert not blocks.keys() & result.finished.keys()
        blocks |= result.finished
    return blocks
