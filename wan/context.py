"""Attention contexts: what the queries of a forward pass see, and at which positions.

The network hands every layer's q, k and v (after norm, before RoPE) to `attend` and knows nothing
else. Token tensors are `[B, frames * tokens_per_frame, heads, head_dim]`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from wan.attention import Backend, attention
from wan.kv_cache import ContextPolicy, KVCache, View
from wan.rope import apply_rope, rotation


class AttentionContext(Protocol):
    """The one verb between the network and what it attends to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output of one layer, shaped like `q`."""
        ...


class FullContext:
    """Every token sees every token (teacher, critic)."""

    def __init__(
        self,
        frames: int,
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        self.rotation = rotation(tuple(range(frames)), grid, head_dim, device)
        self.backend: Backend = backend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        return attention(
            apply_rope(q, self.rotation), apply_rope(k, self.rotation), v, backend=self.backend
        )


def frame_mask(
    frames: int,
    block: int,
    *,
    local_frames: int | None = None,
    independent_first_frame: bool = False,
    teacher_forcing: bool = False,
) -> Tensor:
    """Which frame (row) sees which (column), `[F, F]` bool; the mask of parallel training.

    Block-causal: a frame sees up to the end of its own block, and with `local_frames` no further
    back than that many frames before that end. With `teacher_forcing` it is `[2F, 2F]`: clean
    frames first, block-causal among themselves; a noisy frame sees its own noisy block and the
    clean blocks before it.
    """
    index = torch.arange(frames)
    shift = block - 1 if independent_first_frame else 0
    block_of = (index + shift) // block
    block_end = ((block_of + 1) * block - shift).clamp(max=frames)
    causal = index[None] < block_end[:, None]
    if local_frames is not None:
        causal &= index[None] >= block_end[:, None] - local_frames
    if not teacher_forcing:
        return causal
    own = block_of[:, None] == block_of[None]
    nothing = torch.zeros_like(own)
    return torch.cat([torch.cat([causal, nothing], 1), torch.cat([causal & ~own, own], 1)])


class MaskedContext:
    """Attention under a frame mask (parallel training of the student).

    `mask` is `[F, F]` bool (see `frame_mask`), `positions` the temporal position of each frame.
    FlexAttention on a GPU; the same mask, dense, elsewhere (eager FlexAttention has no backward).
    """

    def __init__(
        self,
        mask: Tensor,
        positions: tuple[int, ...],
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device,
    ) -> None:
        self.rotation = rotation(positions, grid, head_dim, device)
        tokens = grid[0] * grid[1]
        self.dense: Tensor | None = None
        self.sparse: BlockMask | None = None
        if device.type == "cuda":
            self.sparse = _block_mask(mask.to(device), tokens)
        else:
            self.dense = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        q, k = apply_rope(q, self.rotation), apply_rope(k, self.rotation)
        if self.sparse is None:
            return attention(q, k, v, mask=self.dense)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
        return _compiled_flex()(q, k, v, block_mask=self.sparse).transpose(1, 2)


def _block_mask(mask: Tensor, tokens: int) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query // tokens, key // tokens]

    length = mask.shape[0] * tokens
    return create_block_mask(sees, None, None, length, length, device=str(mask.device))


@lru_cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def view_rotations(
    view: View, grid: tuple[int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotations of a pass's queries, and of all its keys, the past first."""
    keys = rotation(view.positions, grid, head_dim, device)
    past_tokens = len(view.frames) * grid[0] * grid[1]
    return keys[past_tokens:], keys


class CachedContext:
    """The queries see frames of the cache, then themselves (rollouts).

    With `write=True` this is a clean pass: each layer's own keys and values are stored as well,
    after the past was read; the caller commits. Otherwise the cache is only read.
    """

    def __init__(
        self,
        cache: KVCache,
        view: View,
        grid: tuple[int, int],
        head_dim: int,
        *,
        write: bool = False,
        upcoming: int = 0,
        backend: Backend = "auto",
    ) -> None:
        """`upcoming`: frames that another part of the same forward stores before this one reads."""
        self.cache = cache
        self.view = view
        self.backend: Backend = backend
        self.past = cache.slots(view.frames, upcoming=upcoming) if view.frames else None
        self.query_rotation, self.key_rotation = view_rotations(view, grid, head_dim, cache.device)
        queries = len(view.positions) - len(view.frames)
        self.destination = cache.next_slots(queries) if write else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        return attention(*self.gather(layer, q, k, v), backend=self.backend)

    def gather(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values of all that is seen, the past first.

        A clean pass stores its own keys and values here, so this is called once per layer.
        """
        keys, values = k, v
        if self.past is not None:
            past_k, past_v = self.cache.read(layer, self.past)
            keys, values = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        if self.destination is not None:
            self.cache.write(layer, self.destination, k, v)
        return apply_rope(q, self.query_rotation), apply_rope(keys, self.key_rotation), values


class SplitContext:
    """Several contexts in one forward: each range of tokens has one of its own.

    In every layer the ranges attend in order, so a later one may read what an earlier one has just
    stored: a clean pass, and the window behind it.
    """

    def __init__(self, parts: Sequence[tuple[int, AttentionContext]]) -> None:
        """`parts`: number of tokens and context of each range."""
        self.sizes = [tokens for tokens, _ in parts]
        self.contexts = [context for _, context in parts]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        ranges = zip(*(x.split(self.sizes, dim=1) for x in (q, k, v)), strict=True)
        outputs = [
            context.attend(layer, *own) for context, own in zip(self.contexts, ranges, strict=True)
        ]
        return torch.cat(outputs, dim=1)


class ForcedContext:
    """All passes of a rollout over a known past, in one forward (training with teacher forcing).

    The sequence holds F clean frames, then the same F noisy ones. `blocks` and `windows` are ranges
    of frames that each cover all F. The clean frames of a block see what its clean pass would, the
    noisy ones of a window what that window would: clean frames by the policy, then themselves.
    """

    def __init__(
        self,
        policy: ContextPolicy,
        blocks: Sequence[range],
        windows: Sequence[range],
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        self.backend: Backend = backend
        tokens, frames = grid[0] * grid[1], blocks[-1].stop
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        """For each pass: tokens of the keys; rotations of the queries and of the keys."""
        self.views: list[View] = []
        for spans, clean_pass, offset in ((blocks, True, 0), (windows, False, frames)):
            for span in spans:
                view = policy.view(span.start, len(span), clean_pass=clean_pass)
                keys = torch.tensor([*view.frames, *(offset + frame for frame in span)])
                index = (keys[:, None] * tokens + torch.arange(tokens)).flatten().to(device)
                self.parts.append((index, *view_rotations(view, grid, head_dim, device)))
                self.views.append(view)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionContext`."""
        queries = q.split([len(own) for _, own, _ in self.parts], dim=1)
        outputs = [
            attention(
                *(apply_rope(query, own), apply_rope(k[:, index], keys), v[:, index]),
                backend=self.backend,
            )
            for query, (index, own, keys) in zip(queries, self.parts, strict=True)
        ]
        return torch.cat(outputs, dim=1)
