"""What a pass may look back at (`ContextPolicy`) and where it is kept (`KVCache`).

The policy is the only place that knows distances: which finished frames a pass sees and at which
temporal positions. The cache is storage alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from utils.devices import to_device
from wan.float8 import from_bytes, to_bytes
from wan.parallel import Share


class View(NamedTuple):
    """What one pass sees: `frames` of the past, then the queries themselves.

    `positions` are temporal positions for RoPE of all keys in that order, counted from the oldest
    frame in view; the last ones belong to the queries. `averaged`: so many frames behind the first
    ones are averaged into the sink (0: its frames are the first ones themselves). `spans`: frames
    of each block of the queries, where a block sees no later one; empty: all see all.
    """

    frames: tuple[int, ...]
    positions: tuple[int, ...]
    averaged: int = 0
    spans: tuple[int, ...] = ()


@dataclass(frozen=True)
class ContextPolicy:
    """Which finished frames a pass attends to.

    `sink_frames`: the first frames of the video, kept for ever.
    `max_frames`: frames in one attention, the pass's own frames included.
    `sink_position`: `contiguous` puts the sink right before the oldest recent frame;
        `original` leaves it at its true distance.
    `clean_pass_sees_sink`: False is the rule of the released Rolling Forcing weights: a clean pass
        sees the newest frames only, the sink among them while it is that recent.
    `window_attention`: with `block_causal` a block of a window sees the past, itself and the blocks
        before it, which are less noisy, but not those behind it: the window of Wave Forcing
        (github.com/SJTU-DENG-Lab/WaveForcing).
    `sink_ema`: weight of the past in an average. The sink that a pass sees then stands for all
        finished frames that the pass does not see themselves (see `sink_weights`): EMA-Sink of
        Reward Forcing (arXiv 2512.04678). None: the sink stays as it is.
    """

    sink_frames: int
    max_frames: int
    sink_position: Literal["contiguous", "original"] = "contiguous"
    clean_pass_sees_sink: bool = True
    window_attention: Literal["full", "block_causal"] = "full"
    sink_ema: float | None = None

    def view(
        self,
        finished: int,
        queries: int,
        *,
        clean_pass: bool = False,
        oldest: int = 0,
        blocks: Sequence[int] = (),
    ) -> View:
        """The view of a pass over frames `finished ... finished + queries - 1`.

        Frames between the sink and `oldest` are no longer stored and are left out. `blocks`: frames
        of each block of a window.
        """
        keeps_sink = self.clean_pass_sees_sink or not clean_pass
        sink = min(self.sink_frames, finished) if keeps_sink else 0
        room = max(0, self.max_frames - queries - (self.sink_frames if keeps_sink else 0))
        oldest_recent = max(sink, finished - room)
        frames = (*range(sink), *range(oldest_recent, finished))
        if oldest > 0:
            frames = tuple(f for f in frames if f < self.sink_frames or f >= oldest)
        averaged = oldest_recent - sink if sink and self.sink_ema is not None else 0
        causal = self.window_attention == "block_causal" and len(blocks) > 1
        positions: Sequence[int] = range(len(frames) + queries)
        if self.sink_position == "original":
            first = frames[0] if frames else finished
            positions = [f - first for f in (*frames, *_span(finished, queries))]
        return View(frames, tuple(positions), averaged, tuple(blocks) if causal else ())

    def sink_from_first(self, view: View, device: torch.device) -> Tensor | None:
        """Weights of all frames from the first one on in the sink of a view `[sink, n]`.

        None where the sink is no average.
        """
        if not view.averaged or self.sink_ema is None:
            return None
        sink, seen = self.sink_frames, self.sink_frames + view.averaged
        return sink_weights(sink, 0, seen, self.sink_ema, torch.float64, device)[:, sink:]

    def reads(self, first: int, frames: int) -> bool:
        """Whether any later pass looks back at frames `first ... first + frames - 1`."""
        averages = self.sink_ema is not None and self.sink_frames > 0
        return averages or first < self.sink_frames or self.recent_capacity(frames) > 0

    def stored(self, finished: int, block_frames: int) -> tuple[int, ...]:
        """Of the first `finished` frames, those that a later pass may look back at, in order."""
        oldest = max(0, finished - self.recent_capacity(block_frames))
        sink = min(self.sink_frames, finished)
        return (*range(sink), *range(max(sink, oldest), finished))

    def recent_capacity(self, block_frames: int) -> int:
        """Most non-sink frames that any pass over at least `block_frames` frames looks back at."""
        pinned = self.sink_frames if self.clean_pass_sees_sink else 0
        return max(0, self.max_frames - block_frames - pinned)

    def stored_capacity(self, block_frames: int) -> int:
        """Non-sink frames that a cache has to hold.

        Beside those that are looked back at a block that is written, and where the sink is averaged
        the block that leaves meanwhile.
        """
        recent = max(self.recent_capacity(block_frames), block_frames)
        if self.sink_ema is None:
            return recent
        return max(recent, self.max_frames - self.sink_frames)


def _span(start: int, length: int) -> range:
    return range(start, start + length)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def sink_weights(
    sink: int, first: int, frames: int, weight: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """How `frames` frames from number `first` on go into an average: `[sink, sink + frames]`.

    Columns: the average of the `sink` frames so far, then these frames. The first `sink` frames of
    a video begin it. Each later one, f, goes into frame j = f mod `sink` of it, one after the
    other: S_j <- a S_j + (1 - a) K_f, with a = `weight`; so a block as long as the sink goes into
    it frame by frame (Reward Forcing, arXiv 2512.04678).
    """
    rows = torch.eye(sink, sink + frames, dtype=torch.float64)
    for place in range(frames):
        past = weight if first + place >= sink else 0.0
        row = rows[(first + place) % sink]
        row *= past
        row[sink + place] = 1 - past
    return to_device(rows.to(dtype), device)


def weighted(weights: Tensor, frames: Tensor) -> Tensor:
    """Sums of `frames` `[B, n, tokens, H, D]` with `weights` `[m, n]`: `[B, m, tokens, H, D]`."""
    return (weights @ frames.flatten(2)).unflatten(2, frames.shape[2:])


class Added(NamedTuple):
    """Frames that the average of a sink takes in: their slots (None: none), and `sink_weights`."""

    weights: Tensor
    slots: Tensor | None


class LayerStore(NamedTuple):
    """Keys (before RoPE) and values of one layer, `[B, slots, tokens, H, D]` each.

    Kept as they are, or as bytes in e4m3 (see `wan/float8.py`). Where the sink is averaged, its
    average so far is kept apart, `[B, sink, tokens, H, D]` in float32 or finer: what one frame adds
    is less than a number in bfloat16 can tell.
    One tensor each, no views of larger ones: of two views of one memory that a compiled graph is
    given, of which it writes one, it takes the places from its first call, and so all layers would
    read and write what belongs to the first.
    """

    keys: Tensor
    values: Tensor
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None

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

    @property
    def sink(self) -> tuple[Tensor, Tensor]:
        """The average of the sink so far: its keys and values."""
        assert self.sink_keys is not None
        assert self.sink_values is not None
        return self.sink_keys, self.sink_values

    def averaged(self, added: Added) -> tuple[Tensor, Tensor]:
        """The average once further frames are in it: `[B, sink * tokens, H, D]` each."""
        keys, values = self.sink
        if added.slots is not None:
            new = (x.unflatten(1, (-1, keys.shape[2])) for x in self.read(added.slots, keys.dtype))
            keys, values = (
                weighted(added.weights, torch.cat([old, x.to(old.dtype)], dim=1))
                for old, x in zip((keys, values), new, strict=True)
            )
        return keys.flatten(1, 2), values.flatten(1, 2)

    def average(self, added: Added) -> None:
        """Take further frames into the average for good."""
        for own, new in zip(self.sink, self.averaged(added), strict=True):
            own.copy_(new.view_as(own))


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
    - With `sink_ema` frames are averaged into the sink when they are committed more than `sink_lag`
      frames back; a pass adds those that are nearer and that it does not see (`added`), and changes
      nothing. So a cache that evicts nothing is never changed by later frames.
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
        sink_ema: float | None = None,
        sink_lag: int = 0,
    ) -> None:
        """`dtype`: of keys and values where they are computed with.

        `sink_ema`: see `ContextPolicy`. `sink_lag`: at most `recent_frames` less those that are
        written at once.
        """
        slots = sink_frames + recent_frames
        own_heads = num_heads // (share.size if share else 1)
        shape = (batch, slots, tokens_per_frame, own_heads, head_dim)
        self._share = share
        self._num_heads = num_heads
        kept = torch.uint8 if in_float8 else dtype
        self.sink_frames = sink_frames
        self.recent_frames = recent_frames
        self.finished = 0
        self.sink_ema = sink_ema if sink_frames else None
        self.sink_lag = sink_lag
        self._averaged = 0  # frames that the average stands for
        stored = [(shape, kept)] * 2
        if self.sink_ema is not None:
            fine = torch.promote_types(dtype, torch.float32)
            stored += [((batch, sink_frames, *shape[2:]), fine)] * 2
        self._layers = [
            LayerStore(*(torch.zeros(size, dtype=each, device=device) for size, each in stored))
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
        return self._latents.nbytes + sum(x.nbytes for own in self._stored().values() for x in own)

    def layer(self, number: int) -> LayerStore:
        """Where one layer's keys and values are."""
        return self._layers[number]

    def share_graphs(self) -> None:
        """Let one compiled graph serve caches that have more or fewer slots than this one."""
        for layer in self._layers:
            for tensor in (layer.keys, layer.values):
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

    def added(self, averaged: int, *, upcoming: int = 0) -> Added:
        """What the average of the sink lacks to stand for `averaged` frames behind the first ones.

        `upcoming`: see `slots`.
        """
        return self._added(range(self._averaged, self.sink_frames + averaged), upcoming=upcoming)

    @torch.no_grad()
    def commit(self, latents: Tensor) -> None:
        """The frames just written are finished: `latents` `[B, n, C, h, w]` are what they hold."""
        upcoming = latents.shape[1]
        finished = self.finished + upcoming
        slots = self.next_slots(upcoming)
        self._latents.index_copy_(1, slots, latents.to(self._latents.dtype))
        # The average comes first: it takes memory, and if there is none all is as it was.
        if self.sink_ema is not None:
            first = self.sink_frames
            self._average(range(self.finished, min(finished, first)), upcoming)
            self._average(range(max(first, self._averaged), self._averaged_at(finished)), upcoming)
        self.finished = finished

    def seek(self, frame: int, *, keep_sink: bool = False) -> None:
        """The frames from `frame` on are to be written anew, those before it count as finished.

        Those between the sink and `frame` that were never written must not be read. With
        `keep_sink` later frames stay averaged into the sink; once the first frames are written
        anew, its average begins again with these.
        """
        self.finished = frame
        if not keep_sink:
            self._averaged = self._averaged_at(frame)

    @property
    def batch(self) -> int:
        """Videos whose frames are stored."""
        return self._latents.shape[0]

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """A copy of what is stored of some videos of the batch, for `put_rows`."""
        kinds = self._stored().values()
        return *(torch.stack([x[rows] for x in own]) for own in kinds), self._latents[rows]

    def put_rows(self, rows: Sequence[int], stored: tuple[Tensor, ...]) -> None:
        """Put back what `rows` gave."""
        *kinds, self._latents[rows] = stored
        for own, saved in zip(self._stored().values(), kinds, strict=True):
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
        stored = {
            name: torch.stack(own if share is None else [share.all_heads(x) for x in own])
            for name, own in self._stored().items()
        }
        return {"finished": self.finished, **stored, "latents": self._latents.clone()}

    def latents_state(self) -> dict[str, Any]:
        """The part of `state_dict` from which keys and values can be computed anew; on the CPU."""
        return {"finished": self.finished, "latents": self._latents.to("cpu", copy=True)}

    def load_latents_state(self, state: Mapping[str, Any]) -> None:
        """Take over the clean latents of another cache; keys and values have to follow."""
        self.seek(state["finished"])
        self._latents.copy_(state["latents"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises ValueError if it comes from a cache of another size."""
        self.check_state(state)
        self.seek(state["finished"])
        for name, own in self._stored().items():
            saved = state[name]
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

    def _stored(self) -> dict[str, list[Tensor]]:
        """The keys of all layers, their values, and the same of an averaged sink, by name."""
        names = LayerStore._fields if self.sink_ema is not None else LayerStore._fields[:2]
        return {name: [getattr(layer, name) for layer in self._layers] for name in names}

    def _averaged_at(self, finished: int) -> int:
        """The frames that the average stands for, once so many are finished."""
        return max(min(self.sink_frames, finished), finished - self.sink_lag)

    def _average(self, frames: range, upcoming: int) -> None:
        """Take frames into the average for good, of which `upcoming` are just stored."""
        if frames:
            added = self._added(frames, upcoming=upcoming)
            for layer in self._layers:
                layer.average(added)
            self._averaged = max(self._averaged, frames.stop)

    def _added(self, frames: range, *, upcoming: int = 0) -> Added:
        assert self.sink_ema is not None, "this sink is not averaged"
        size, dtype = self.sink_frames, self._layers[0].sink[0].dtype
        first = frames.start if frames.start < size else size + frames.start % size
        weights = sink_weights(size, first, len(frames), self.sink_ema, dtype, self.device)
        return Added(weights, self.slots(tuple(frames), upcoming=upcoming) if frames else None)

    def _slot(self, frame: int) -> int:
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % self.recent_frames

    def _index(self, slots: list[int]) -> Tensor:
        return to_device(torch.tensor(slots, dtype=torch.int64), self.device)
