"""What a pass may look back at (`ContextPolicy`) and where it is kept (`KVCache`).

The policy is the only place that knows distances: which finished frames a pass sees and at which
temporal positions. The cache is storage alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from utils.devices import to_device
from wan.float8 import from_bytes, to_bytes
from wan.parallel import Share


class View(NamedTuple):
    """What one pass sees: `frames` of the past, then the queries themselves.

    `positions` are temporal positions for RoPE of all keys in that order, counted from the oldest
    frame in view; the last ones belong to the queries.
    """

    frames: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class ContextPolicy:
    """Which finished frames a pass attends to.

    `sink_frames`: the first frames of the video, kept for ever.
    `max_frames`: frames in one attention, the pass's own frames included.
    `sink_position`: `contiguous` puts the sink right before the oldest recent frame;
        `original` leaves it at its true distance.
    `clean_pass_sees_sink`: False is the rule of the released Rolling Forcing weights: a clean pass
        sees the newest frames only, the sink among them while it is that recent.
    """

    sink_frames: int
    max_frames: int
    sink_position: Literal["contiguous", "original"] = "contiguous"
    clean_pass_sees_sink: bool = True

    def view(
        self, finished: int, queries: int, *, clean_pass: bool = False, oldest: int = 0
    ) -> View:
        """The view of a pass over frames `finished ... finished + queries - 1`.

        Frames between the sink and `oldest` are no longer stored and are left out.
        """
        keeps_sink = self.clean_pass_sees_sink or not clean_pass
        sink = min(self.sink_frames, finished) if keeps_sink else 0
        room = max(0, self.max_frames - queries - (self.sink_frames if keeps_sink else 0))
        oldest_recent = max(sink, finished - room)
        frames = (*range(sink), *range(oldest_recent, finished))
        if oldest > 0:
            frames = tuple(f for f in frames if f < self.sink_frames or f >= oldest)
        if self.sink_position == "original":
            first = frames[0] if frames else finished
            return View(frames, tuple(f - first for f in (*frames, *_span(finished, queries))))
        return View(frames, tuple(range(len(frames) + queries)))

    def reads(self, first: int, frames: int) -> bool:
        """Whether any later pass looks back at frames `first ... first + frames - 1`."""
        return first < self.sink_frames or self.recent_capacity(frames) > 0

    def stored(self, finished: int, block_frames: int) -> tuple[int, ...]:
        """Of the first `finished` frames, those that a later pass may look back at, in order."""
        oldest = max(0, finished - self.recent_capacity(block_frames))
        sink = min(self.sink_frames, finished)
        return (*range(sink), *range(max(sink, oldest), finished))

    def recent_capacity(self, block_frames: int) -> int:
        """Most non-sink frames that any pass over at least `block_frames` frames looks back at."""
        pinned = self.sink_frames if self.clean_pass_sees_sink else 0
        return max(0, self.max_frames - block_frames - pinned)


def _span(start: int, length: int) -> range:
    return range(start, start + length)


class LayerStore(NamedTuple):
    """Keys (before RoPE) and values of one layer, `[B, slots, tokens, H, D]` each.

    Kept as they are, or as bytes in e4m3 (see `wan/float8.py`).
    One tensor each, no views of larger ones: of two views of one memory that a compiled graph is
    given, of which it writes one, it takes the places from its first call, and so all layers would
    read and write what belongs to the first.
    """

    keys: Tensor
    values: Tensor

    def read(self, slots: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values of the frames in `slots`: `[B, n * tokens, H, D]` each, copied.

        What is kept in e4m3 comes in `dtype`, everything else as it is.
        """
        keys = self.keys.index_select(1, slots).flatten(1, 2)
        values = self.values.index_select(1, slots).flatten(1, 2)
        if keys.dtype == torch.uint8:
            return from_bytes(keys, dtype), from_bytes(values, dtype)
        return keys, values

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k (before RoPE) and v `[B, n * tokens, H, D]`; no gradient goes in."""
        tokens = self.keys.shape[2]
        k, v = k.detach(), v.detach()
        if self.keys.dtype == torch.uint8:
            k, v = to_bytes(k), to_bytes(v)
        self.keys.index_copy_(1, slots, k.unflatten(1, (-1, tokens)))
        self.values.index_copy_(1, slots, v.unflatten(1, (-1, tokens)))


class KVCache:
    """Keys, values and clean latents of finished frames, of all layers.

    Contract:

    - Frame-granular. The first `sink_frames` frames have slots of their own and are never
      evicted; the newest `recent_frames` later ones live in a ring. `holds(frame)` tells whether a
      frame is still there; `slots(frames)` raises if one is not.
    - Keys are stored after their norm and **before** RoPE. Positions are given at retrieval, so
      nothing here depends on how long the video is.
    - `layer(number)` is where one layer reads and writes (see `LayerStore`): always the same
      tensors. To read copies out and changes nothing. A pass reads the past, and may be recomputed
      as long as the frames it read are held.
    - Keys and values may be kept in e4m3, half the memory. What is read is rounded then; keys and
      values need no scale for it (see docs/performance.md).
    - Up to `recent_frames` frames are written at once.
    - The clean pass of the frames `finished ... finished+n-1` writes once per layer, each layer
      after it has read; no gradient goes in. `commit` then makes them the past, with their clean
      latents. Until `commit` the cache still means what it meant, except that frames about to be
      evicted may already be overwritten.
    - Slots are Python ints in, one small index tensor per pass out; nothing synchronises with the
      device.
    - With a `share` it holds the keys and values of this rank's heads alone. A state holds all
      heads: all ranks make it together, and load what the first of them has.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        tokens_per_frame: int,
        latent: tuple[int, int, int],
        sink_frames: int,
        recent_frames: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        share: Share | None = None,
        in_float8: bool = False,
    ) -> None:
        """`dtype`: of keys and values where they are computed with."""
        slots = sink_frames + recent_frames
        own_heads = num_heads // (share.size if share else 1)
        shape = (batch, slots, tokens_per_frame, own_heads, head_dim)
        self._share = share
        self._num_heads = num_heads
        kept = torch.uint8 if in_float8 else dtype
        self.sink_frames = sink_frames
        self.recent_frames = recent_frames
        self.finished = 0
        self._layers = [
            LayerStore(*(torch.zeros(shape, dtype=kept, device=device) for _ in range(2)))
            for _ in range(num_layers)
        ]
        self._latents = torch.zeros((batch, slots, *latent), dtype=torch.float32, device=device)

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self._latents.device

    @property
    def num_bytes(self) -> int:
        """Memory of everything stored."""
        return self._latents.nbytes + sum(t.nbytes for layer in self._layers for t in layer)

    def layer(self, number: int) -> LayerStore:
        """Where one layer's keys and values are."""
        return self._layers[number]

    def share_graphs(self) -> None:
        """Let one compiled graph serve caches that have more or fewer slots than this one."""
        for layer in self._layers:
            for tensor in layer:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)

    def holds(self, frame: int, *, upcoming: int = 0) -> bool:
        """Whether a finished frame is still stored once the next `upcoming` ones are, too."""
        finished = self.finished + upcoming
        pinned = frame < self.sink_frames
        return 0 <= frame < finished and (pinned or frame >= finished - self.recent_frames)

    def slots(self, frames: tuple[int, ...], *, upcoming: int = 0) -> Tensor:
        """Index tensor of stored frames, for `LayerStore.read`; KeyError for one that is gone.

        The next `upcoming` frames count as stored: every layer writes them before it reads.
        """
        gone = [frame for frame in frames if not self.holds(frame, upcoming=upcoming)]
        if gone:
            raise KeyError(f"frames {gone} are not in the cache ({self.finished} finished)")
        return self._index([self._slot(frame) for frame in frames])

    def next_slots(self, frames: int) -> Tensor:
        """Index tensor of where the next `frames` finished frames go, for `LayerStore.write`."""
        if frames > self.recent_frames:
            raise ValueError(
                f"{frames} frames at once do not fit a ring of {self.recent_frames} frames"
            )
        return self._index([self._slot(frame) for frame in _span(self.finished, frames)])

    @torch.no_grad()
    def commit(self, latents: Tensor) -> None:
        """The frames just written are finished: `latents` `[B, n, C, h, w]` are what they hold."""
        slots = self.next_slots(latents.shape[1])
        self._latents.index_copy_(1, slots, latents.to(self._latents.dtype))
        self.finished += latents.shape[1]

    def seek(self, frame: int) -> None:
        """The frames from `frame` on are to be written anew, those before it count as finished.

        Those between the sink and `frame` that were never written must not be read.
        """
        self.finished = frame

    @property
    def batch(self) -> int:
        """Videos whose frames are stored."""
        return self._latents.shape[0]

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A copy of what is stored of some videos of the batch, for `put_rows`."""
        keys, values = (torch.stack([x[rows] for x in own]) for own in self._stored())
        return keys, values, self._latents[rows]

    def put_rows(self, rows: Sequence[int], stored: tuple[Tensor, Tensor, Tensor]) -> None:
        """Put back what `rows` gave."""
        *pair, self._latents[rows] = stored
        for own, saved in zip(self._stored(), pair, strict=True):
            for x, part in zip(own, saved, strict=True):
                x[rows] = part

    def latents(self, frames: tuple[int, ...]) -> Tensor:
        """Clean latents of stored frames: `[B, n, C, h, w]`, float32."""
        return self._latents.index_select(1, self.slots(frames))

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, for `load_state_dict` on a cache of the same sizes.

        Keys and values are `[layers, B, slots, tokens, H, D]` in it.
        """
        share = self._share
        keys, values = (
            torch.stack(own if share is None else [share.all_heads(x) for x in own])
            for own in self._stored()
        )
        return {
            "finished": self.finished,
            "keys": keys,
            "values": values,
            "latents": self._latents.clone(),
        }

    def latents_state(self) -> dict[str, Any]:
        """The part of `state_dict` from which keys and values can be computed anew; on the CPU."""
        return {"finished": self.finished, "latents": self._latents.to("cpu", copy=True)}

    def load_latents_state(self, state: Mapping[str, Any]) -> None:
        """Take over the clean latents of another cache; keys and values have to follow."""
        self.finished = state["finished"]
        self._latents.copy_(state["latents"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises ValueError if it comes from a cache of another size."""
        self.check_state(state)
        self.finished = state["finished"]
        for own, saved in zip(self._stored(), (state["keys"], state["values"]), strict=True):
            for layer, x in enumerate(own):
                if self._share is None:
                    x.copy_(saved[layer])
                else:
                    whole = None if saved is None else saved[layer]
                    x.copy_(self._share.heads_of_first(whole, x))
        self._latents.copy_(state["latents"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """ValueError unless a state is of a cache of this size, and kept in the same way."""
        store = self._layers[0].keys
        keys = state.get("keys")  # None where another rank has them
        if keys is not None and (keys.dtype == torch.uint8) != (store.dtype == torch.uint8):
            raise ValueError("this state was made with another kv_cache_dtype")
        sizes = {
            "keys": (len(self._layers), *store.shape[:-2], self._num_heads, store.shape[-1]),
            "latents": tuple(self._latents.shape),
        }
        for name, own in sizes.items():
            found = own if state.get(name) is None else tuple(state[name].shape)
            if found != own:
                raise ValueError(f"this state is of a cache of {found}, not {own}")

    def _stored(self) -> tuple[list[Tensor], list[Tensor]]:
        """The keys of all layers, and their values."""
        return [layer.keys for layer in self._layers], [layer.values for layer in self._layers]

    def _slot(self, frame: int) -> int:
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % self.recent_frames

    def _index(self, slots: list[int]) -> Tensor:
        return to_device(torch.tensor(slots, dtype=torch.int64), self.device)
