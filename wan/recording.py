"""Looking at attention while it happens: how much of it falls on each frame that is seen."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.attention import Backend
from wan.context import CachedContext, CachedLayer, LayerContext, attention_by_block

CHUNK_ELEMENTS = 2**23
"""Scores held at a time, in float32."""


class RecordingContext:
    """A cached context that also tells where the attention of some layers went.

    What comes out is what the inner context gives, bit for bit. `blocks` are the frames of each
    block of queries; for each layer of `layers` `record(layer, masses)` is called, with the masses
    of `frame_masses`. A forward pass of it runs outside of compiled graphs.
    """

    steady = False

    def __init__(
        self,
        inner: CachedContext,
        blocks: Sequence[int],
        layers: Container[int],
        record: Callable[[int, Tensor], None],
    ) -> None:
        self.inner = inner
        self.blocks = blocks
        self.layers = layers
        self.record = record

    def of(self, layer: int) -> LayerContext:
        """See `AttentionContext`."""
        inner = self.inner.of(layer)
        return _RecordingLayer(self, layer, inner) if layer in self.layers else inner


@dataclass(frozen=True)
class _RecordingLayer:
    context: RecordingContext
    layer: int
    inner: CachedLayer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        """See `LayerContext`."""
        q, keys, values = self.inner.gather(q, k, v)
        tokens = keys.shape[1] // len(self.context.inner.view.positions)
        causal = bool(self.inner.spans)
        masses = frame_masses(q, keys, tokens, self.context.blocks, causal=causal)
        self.context.record(self.layer, masses)
        return attention_by_block(q, keys, values, self.inner.spans, backend=backend)


@torch.no_grad()
def frame_masses(
    q: Tensor, keys: Tensor, tokens: int, blocks: Sequence[int], *, causal: bool = False
) -> Tensor:
    """Softmax mass on each key frame, averaged over batch, heads and the queries of a block.

    q `[B, sum(blocks) * tokens, H, D]`, keys `[B, F * tokens, H, D]`, both rotated ->
    `[blocks, F]`, float32 on the CPU; every row sums to 1. `causal`: no block sees those of the
    queries behind it.
    """
    keys = keys.float()
    seen = keys.shape[1] - q.shape[1] if causal else keys.shape[1]
    chunk = max(1, CHUNK_ELEMENTS // (keys.shape[0] * keys.shape[1] * keys.shape[2]))
    rows = []
    for queries in q.split([frames * tokens for frames in blocks], dim=1):
        seen += queries.shape[1] if causal else 0
        total = torch.zeros(keys.shape[1] // tokens, device=q.device)
        for part in queries.split(chunk, dim=1):
            scores = torch.einsum("bqhd,bkhd->bhqk", part.float(), keys[:, :seen])
            masses = (scores * q.shape[-1] ** -0.5).softmax(-1)
            masses = masses.unflatten(-1, (-1, tokens)).sum(-1)  # [B, H, chunk, frames seen]
            total[: seen // tokens] += masses.mean((0, 1)).sum(0)
        rows.append(total / queries.shape[1])
    return torch.stack(rows).cpu()
