"""Streams: finished blocks as they come, as latents or as video frames."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.rollout import Rollout
from utils.errors import UserError
from utils.video import to_uint8
from wan.vae import StreamingDecoder

PrefixFrames = Literal["reconstructed", "none"]
NOT_FINITE = (
    "(NaN or Inf): the weights are damaged or do not fit these settings, or the values are too "
    "large for this dtype; try dtype=float32"
)

STREAM_KEYS = frozenset(["seed", "next_index", "latents", "decoder"])


class LatentStream:
    """Clean latents of one block after the other, cut to the requested length.

    Blocks of a prefix come first. Iterating gives `(block, latents [B, n, C, h, w])`.
    """

    def __init__(
        self, rollout: Rollout, *, prefix: Sequence[Tensor] = (), num_latent_frames: int | None
    ) -> None:
        self.rollout = rollout
        self.num_latent_frames = num_latent_frames
        self._ready: deque[tuple[int, Tensor]] = deque(enumerate(prefix))

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self

    def __next__(self) -> tuple[int, Tensor]:
        while not self._ready:
            result = self.rollout.step()
            if result is None:
                raise StopIteration
            self._ready.extend(sorted(result.finished.items()))
        block, latents = self._ready.popleft()
        if self.num_latent_frames is not None:
            latents = latents[:, : self.num_latent_frames - self.rollout.layout.start(block)]
        if latents.shape[1] == 0:
            raise StopIteration
        return block, latents

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for `load_state_dict` on one opened the same way."""
        ready = [(block, latents.clone()) for block, latents in self._ready]
        return {"rollout": self.rollout.state_dict(), "ready": ready}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream stood."""
        self.rollout.load_state_dict(state["rollout"])
        device = self.rollout.cache.device
        self._ready = deque((block, latents.to(device)) for block, latents in state["ready"])


class Stream:
    """Video frames block by block: an iterator and a context manager.

    Each item is uint8 `[n, H, W, 3]` on the CPU, in order; a block is handed out before the next
    one is computed. Without a prefix n is 9 for a first block of 3 latent frames, then 12.
    `close` (or leaving the `with`) frees cache and decoder state; other streams are not touched.
    """

    def __init__(
        self,
        latents: LatentStream,
        decoder: StreamingDecoder,
        *,
        seed: int,
        first_emitted_block: int = 0,
    ) -> None:
        self._latents: LatentStream | None = latents
        self._decoder = decoder
        self._first_emitted_block = first_emitted_block
        self.seed = seed
        self.next_index = 0

    def __enter__(self) -> "Stream":
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        frames = self.next_block()
        if frames is None:
            raise StopIteration
        return frames

    @property
    def rollout(self) -> Rollout:
        """The engine behind the stream; its `text` may be replaced between blocks."""
        return self._open().rollout

    def next_block(self) -> Tensor | None:
        """Frames of the next block, uint8 `[n, H, W, 3]`; None when the video is complete."""
        batch = self.next_batch()
        return None if batch is None else batch[0]

    def next_batch(self) -> Tensor | None:
        """The same for every video of the batch: `[B, n, H, W, 3]`."""
        while True:
            item = next(self._open(), None)
            if item is None:
                return None
            block, latents = item
            self.next_index = block + 1
            frames = self._decode(block, latents)
            if block >= self._first_emitted_block:
                return frames

    def close(self) -> None:
        """Free everything the stream holds; it cannot be used afterwards. Idempotent."""
        self._latents = None
        self._decoder.close()

    def state_dict(self) -> dict[str, Any]:
        """Cache, blocks in flight, decoder features and position: tensors and plain values."""
        return {
            "seed": self.seed,
            "next_index": self.next_index,
            "latents": self._open().state_dict(),
            "decoder": self._decoder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the stream that gave `state` stood.

        This stream must have been opened with the same seed, schedule and sizes; otherwise
        ValueError, before anything changes.
        """
        if not isinstance(state, Mapping) or not state.keys() >= STREAM_KEYS:
            raise ValueError("this is no state of a stream: give what state_dict returned")
        if state["seed"] != self.seed:
            raise ValueError(f"this state has seed {state['seed']}, the stream {self.seed}")
        self._open().load_state_dict(state["latents"])
        self._decoder.load_state_dict(state["decoder"])
        self.next_index = state["next_index"]

    @torch.no_grad()
    def _decode(self, block: int, latents: Tensor) -> Tensor:
        """Frames on the CPU; raises UserError where they are made of NaN or Inf."""
        video = self._decoder.decode(latents)
        finite = torch.stack([_extent(latents), _extent(video)])  # read once the copy has waited
        frames = to_uint8(video).cpu()
        numbers = finite.isfinite().tolist()
        if not all(numbers):
            what = "latents" if not numbers[0] else "frames"
            raise UserError(f"block {block} has {what} that are not numbers {NOT_FINITE}")
        return frames

    def _open(self) -> LatentStream:
        if self._latents is None:
            raise RuntimeError("this stream is closed: open another one")
        return self._latents


def _extent(values: Tensor) -> Tensor:
    """Largest less smallest value, float32, on its device: a number only if all of them are."""
    low, high = torch.aminmax(values.float())
    return high - low
