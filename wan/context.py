"""Attention contexts: what the queries of a forward pass see, and at which positions.

The network asks the context for its part in each layer, hands that its q, k and v (after norm,
before RoPE) and knows nothing else. A part is a tuple of tensors that says how they are used: the
number of the layer is not in it, so that all layers are one graph to a compiler. Token tensors are
`[B, frames * tokens_per_frame, heads, head_dim]`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from wan.attention import Backend, attention
from wan.kv_cache import (
    Added,
    ContextPolicy,
    KVCache,
    LayerStore,
    View,
    weighted,
)
from wan.parallel import Share
from wan.rope import apply_rope, rotation


class LayerContext(Protocol):
    """A context's part in one layer, in compiled code too: tensors and plain values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """Attention output of the layer, shaped like `q`."""
        ...


class AttentionContext(Protocol):
    """What one forward pass attends to.

    `steady`: passes of these sizes come again and again, so a network that is compiled for steady
    sizes has a graph for them (see `WanDiT.compile_blocks`). False where code runs that is not for
    a graph.
    """

    @property
    def steady(self) -> bool: ...  # noqa: D102

    def of(self, layer: int) -> LayerContext:
        """The part in one layer; each layer attends once, in order."""
        ...


class FullContext:
    """Every token sees every token (teacher, critic)."""

    steady = True

    def __init__(
        self, frames: int, grid: tuple[int, int], head_dim: int, device: torch.device
    ) -> None:
        self.layer = FullLayer(rotation(tuple(range(frames)), grid, head_dim, device))

    def of(self, layer: int) -> "FullLayer":
        """See `AttentionContext`."""
        return self.layer


class FullLayer(NamedTuple):
    """The same in every layer."""

    rotation: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        q, k = apply_rope(q, self.rotation), apply_rope(k, self.rotation)
        return attention(q, k, v, backend=backend)


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

    steady = True

    def __init__(
        self,
        mask: Tensor,
        positions: tuple[int, ...],
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device,
    ) -> None:
        turn, tokens = rotation(positions, grid, head_dim, device), grid[0] * grid[1]
        if device.type == "cuda":
            self.layer = MaskedLayer(turn, sparse=_block_mask(mask.to(device), tokens))
        else:
            dense = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
            self.layer = MaskedLayer(turn, dense=dense.to(device))

    def of(self, layer: int) -> "MaskedLayer":
        """See `AttentionContext`."""
        return self.layer


class MaskedLayer(NamedTuple):
    """The same in every layer; the mask `[tokens, tokens]` is there in one of two forms."""

    rotation: Tensor
    dense: Tensor | None = None
    sparse: BlockMask | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        q, k = apply_rope(q, self.rotation), apply_rope(k, self.rotation)
        if self.sparse is None:
            return attention(q, k, v, mask=self.dense)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
        flex = cast(_Flex, flex_attention) if torch.compiler.is_compiling() else _compiled_flex()
        return flex(q, k, v, block_mask=self.sparse).transpose(1, 2)


def _block_mask(mask: Tensor, tokens: int) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query // tokens, key // tokens]

    length = mask.shape[0] * tokens
    return create_block_mask(sees, None, None, length, length, device=str(mask.device))


_Flex = Callable[..., Tensor]


@lru_cache
def _compiled_flex() -> _Flex:
    return torch.compile(flex_attention, dynamic=False)


def attention_by_block(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], *, backend: Backend = "auto"
) -> Tensor:
    """Attention of queries that see the past, themselves and the blocks of queries before them.

    The last keys are those of the queries; `spans`: tokens of each block of the queries, none where
    all see all. A block's keys are the first ones of all keys, so there is no mask and no copy: one
    call of any kernel for each block, over what it sees and no more.
    """
    if not spans:
        return attention(q, k, v, backend=backend)
    seen = accumulate(spans, initial=k.shape[1] - q.shape[1])
    next(seen)
    outputs = [
        attention(queries, k[:, :end], v[:, :end], backend=backend)
        for queries, end in zip(q.split(list(spans), dim=1), seen, strict=True)
    ]
    return torch.cat(outputs, dim=1)


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
        steady: bool = False,
    ) -> None:
        """`upcoming`: frames that another part of the same forward stores before this one reads."""
        self.cache = cache
        self.view = view
        self.steady = steady
        tokens, past = grid[0] * grid[1], view.frames
        self.sink = None
        if view.averaged:
            self.sink = cache.added(view.averaged, upcoming=upcoming)
            past = past[cache.sink_frames :]
        self.past = cache.slots(past, upcoming=upcoming) if past else None
        self.spans = tuple(frames * tokens for frames in view.spans)
        self.query_rotation, self.key_rotation = view_rotations(view, grid, head_dim, cache.device)
        queries = len(view.positions) - len(view.frames)
        self.destination = cache.next_slots(queries) if write else None

    def of(self, layer: int) -> "CachedLayer":
        """See `AttentionContext`."""
        store = self.cache.layer(layer)
        return CachedLayer(
            store,
            self.past,
            self.destination,
            self.query_rotation,
            self.key_rotation,
            self.sink,
            self.spans,
        )


class CachedLayer(NamedTuple):
    """Slots that are read (`past`) and written (`destination`) in one layer, and rotations.

    `sink`: of an averaged one, which is read before the past. `spans`: see `attention_by_block`.
    """

    store: LayerStore
    past: Tensor | None
    destination: Tensor | None
    query_rotation: Tensor
    key_rotation: Tensor
    sink: Added | None
    spans: tuple[int, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        return attention_by_block(*self.gather(q, k, v), self.spans, backend=backend)

    def gather(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values of all that is seen, the past first.

        A clean pass stores its own keys and values here, so this is called once.
        """
        keys, values = self._seen(k, v)
        if self.destination is not None:  # last: what is read is used up then, and is not copied
            self.store.write(self.destination, k, v)
        return apply_rope(q, self.query_rotation), keys, values

    def _seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of all that is seen; their parts are dropped on return."""
        keys, values = [apply_rope(k, self.query_rotation)], [v]
        end = len(self.key_rotation) - k.shape[1]
        for past_k, past_v in self._past(k.dtype):  # the newest first
            begin = end - past_k.shape[1]
            keys.insert(0, apply_rope(past_k, self.key_rotation[begin:end]))
            values.insert(0, past_v)
            end = begin
        return _joined(keys), _joined(values)

    def _past(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys before RoPE and values of the recent frames, then of an averaged sink."""
        if self.past is not None:
            yield self.store.read(self.past, dtype)
        if self.sink is not None:
            keys, values = self.store.averaged(self.sink)
            yield keys.to(dtype), values.to(dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tokens of all parts `[B, n, H, D]`, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class SplitContext:
    """Several contexts in one forward: each range of tokens has one of its own.

    In every layer the ranges attend in order, so a later one may read what an earlier one has just
    stored: a clean pass, and the window behind it.
    """

    def __init__(self, parts: Sequence[tuple[int, AttentionContext]]) -> None:
        """`parts`: number of tokens and context of each range."""
        self.sizes = tuple(tokens for tokens, _ in parts)
        self.contexts = [context for _, context in parts]
        self.steady = all(context.steady for context in self.contexts)

    def of(self, layer: int) -> "SplitLayer":
        """See `AttentionContext`."""
        return SplitLayer(self.sizes, tuple(context.of(layer) for context in self.contexts))


class SplitLayer(NamedTuple):
    """Tokens of each range, and what it attends to."""

    sizes: tuple[int, ...]
    parts: tuple[LayerContext, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        ranges = zip(*(x.split(self.sizes, dim=1) for x in (q, k, v)), strict=True)
        outputs = [
            part.attend(q, k, v, backend)
            for part, (q, k, v) in zip(self.parts, ranges, strict=True)
        ]
        return torch.cat(outputs, dim=1)


class SharedContext:
    """Another context, over the heads of this rank."""

    def __init__(self, inner: AttentionContext, share: Share, frames: int) -> None:
        self.inner = inner
        self.share = share
        self.frames = frames

    @property
    def steady(self) -> bool:
        """See `AttentionContext`."""
        return self.inner.steady

    def of(self, layer: int) -> "SharedLayer":
        """See `AttentionContext`."""
        return SharedLayer(self.inner.of(layer), self.share, self.frames)


class SharedLayer(NamedTuple):
    """What the heads of this rank attend to, around which ranks exchange tokens for heads."""

    inner: LayerContext
    share: Share
    frames: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        q, k, v = self.share.to_heads(torch.stack([q, k, v]), self.frames)
        return self.share.to_tokens(self.inner.attend(q, k, v, backend), self.frames)


class ForcedContext:
    """All passes of a rollout over a known past, in one forward (training with teacher forcing).

    The sequence holds F clean frames, then the same F noisy ones. `blocks` and `windows` are ranges
    of frames that each cover all F. The clean frames of a block see what its clean pass would, the
    noisy ones of a window what that window would: clean frames by the policy, then themselves.
    """

    steady = True

    def __init__(
        self,
        policy: ContextPolicy,
        blocks: Sequence[range],
        windows: Sequence[range],
        grid: tuple[int, int],
        head_dim: int,
        device: torch.device,
    ) -> None:
        tokens, frames = grid[0] * grid[1], blocks[-1].stop
        parts: list[ForcedPart] = []
        self.views: list[View] = []
        for spans, clean_pass, offset in ((blocks, True, 0), (windows, False, frames)):
            for span in spans:
                inner = [len(block) for block in blocks if block.start in span]
                view = policy.view(span.start, len(span), clean_pass=clean_pass, blocks=inner)
                sink = policy.sink_frames if view.averaged else 0
                keys = torch.tensor([*view.frames[sink:], *(offset + frame for frame in span)])
                index = (keys[:, None] * tokens + torch.arange(tokens)).flatten().to(device)
                parts.append(
                    ForcedPart(
                        index,
                        *view_rotations(view, grid, head_dim, device),
                        policy.sink_from_first(view, device),
                        tuple(frames * tokens for frames in view.spans),
                    )
                )
                self.views.append(view)
        self.layer = ForcedLayer(tuple(parts), tokens)

    def of(self, layer: int) -> "ForcedLayer":
        """See `AttentionContext`."""
        return self.layer


class ForcedPart(NamedTuple):
    """Of one pass: tokens of the keys; rotations of the queries and of the keys.

    `sink`: of an averaged one, whose keys come before the others, weights of all frames from the
    first one on (see `sink_weights`). `spans`: see `attention_by_block`.
    """

    keys: Tensor
    query_rotation: Tensor
    key_rotation: Tensor
    sink: Tensor | None
    spans: tuple[int, ...]

    def seen(self, x: Tensor, tokens: int) -> Tensor:
        """Keys or values of what is seen, of those of the whole sequence `[B, n, H, D]`."""
        own = x[:, self.keys]
        if self.sink is None:
            return own
        fine = torch.promote_types(x.dtype, torch.float32)
        frames = x[:, : self.sink.shape[1] * tokens].unflatten(1, (-1, tokens)).to(fine)
        sink = weighted(self.sink.to(fine), frames).flatten(1, 2).to(x.dtype)
        return torch.cat([sink, own], dim=1)


class ForcedLayer(NamedTuple):
    """The passes in order of their queries, and tokens of a frame; the same in every layer."""

    parts: tuple[ForcedPart, ...]
    tokens: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        queries = q.split([len(part.query_rotation) for part in self.parts], dim=1)
        outputs = [
            attention_by_block(
                apply_rope(query, part.query_rotation),
                apply_rope(part.seen(k, self.tokens), part.key_rotation),
                part.seen(v, self.tokens),
                part.spans,
                backend=backend,
            )
            for query, part in zip(queries, self.parts, strict=True)
        ]
        return torch.cat(outputs, dim=1)
