"""Streams: finished blocks as they come, as latents or as video frames."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from pipeline import inputs
from pipeline.changes import BRANCH, Change, Direction, Policy, Timeline
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from utils.devices import to_host
from utils.embeddings import pad_batch
from utils.errors import UserError
from utils.noise import NoiseSource
from utils.video import to_uint8
from wan.dit import WanDiT
from wan.vae import StreamingDecoder

T = TypeVar("T")

PrefixFrames = Literal["reconstructed", "none"]
Measure = Callable[[str], AbstractContextManager[Any]]
"""Around a part of the work, by its name: who wants to know times it."""

NOT_FINITE = (
    "(NaN or Inf): the weights are damaged or do not fit these settings, or the values are too "
    "large for this dtype; try dtype=float32"
)

STREAM_KEYS = frozenset(["seed", "weights", "next_index", "latents"])
WARM_UP_FRAMES = 6
"""Latent frames from which the decoder of a branch takes up the past."""


class Beginning(NamedTuple):
    """What a latent stream begins with, beside its setup and network.

    `text` `[B, L, dim]`; `negative`, the same, where there is guidance. `samples`: of `noise`, the
    one of each row. `prefix`: clean latents of the first blocks `[B, n, C, h, w]`.
    `num_latent_frames`, `num_blocks`: None for a stream without an end. `recent_frames`: see
    `Setup.cache`.
    """

    text: Tensor
    negative: Tensor | None
    noise: NoiseSource
    samples: tuple[int, ...]
    prefix: tuple[Tensor, ...]
    num_latent_frames: int | None
    num_blocks: int | None
    recent_frames: int | None


class LatentStream:
    """Clean latents of one block after the other, cut to the requested length.

    Blocks of a prefix come first. Iterating gives `(block, latents [B, n, C, h, w])`. Changes of
    prompt go through `add`.
    """

    def __init__(
        self,
        direction: Direction,
        *,
        prefix: Sequence[Tensor] = (),
        num_latent_frames: int | None,
    ) -> None:
        self.direction = direction
        self.rollout = direction.rollout
        self.num_latent_frames = num_latent_frames
        self._ready: deque[tuple[int, Tensor]] = deque(enumerate(prefix))

    @classmethod
    @torch.no_grad()
    def open(cls, setup: Setup, dit: WanDiT, begin: Beginning) -> Self:
        """A stream at its beginning, with a cache of its own, on the device of `dit`."""
        rows = begin.text
        if begin.negative is not None:
            rows = pad_batch([*rows, *begin.negative.to(rows)])
        rollout = setup.rollout(
            dit,
            setup.schedule(begin.num_blocks, len(begin.prefix)),
            text=dit.encode_text(rows.to(dit.device)),
            noise=BlockNoise(begin.noise, begin.samples, dit.device),
            guidance_scale=setup.guidance_scale,
            recent_frames=begin.recent_frames,
            prefix=begin.prefix,
        )
        return cls(
            Direction(rollout, begin.text, begin.negative),
            prefix=begin.prefix,
            num_latent_frames=begin.num_latent_frames,
        )

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self

    def __next__(self) -> tuple[int, Tensor]:
        item = self.peek()
        if item is None:
            raise StopIteration
        self.take()
        return item

    def peek(self, look: Callable[[], None] = lambda: None) -> tuple[int, Tensor] | None:
        """The next block, computed if it is not there yet; None at the end of the video.

        `look` is called behind each window; what it raises ends the work.
        """
        while not self._ready:
            finished = self.advance()
            if finished is None:
                return None
            look()
            self._ready.extend(sorted(finished.items()))
        block, latents = self._ready[0]
        if self.num_latent_frames is not None:
            latents = latents[:, : self.num_latent_frames - self.rollout.layout.start(block)]
        return (block, latents) if latents.shape[1] else None

    def take(self) -> None:
        """What `peek` gave has been handed out."""
        self._ready.popleft()

    def advance(self) -> dict[int, Tensor] | None:
        """Make the changes that wait, then run the next window: the blocks that it finishes.

        None at the end of the video.
        """
        self.direction.prepare()
        result = self.rollout.step()
        return None if result is None else result.finished

    def rehearse(self) -> None:
        """Have the graphs of a compiled network made: see `Rollout.rehearse`."""
        self.rollout.rehearse()

    def add(self, text: Tensor | None, **change: Any) -> Change:
        """A change before the next window: see `Direction.add`."""
        return self.direction.add(text, **change)

    def rebuild(self) -> None:
        """Make the cache anew from what `state_dict(latents_only=True)` holds."""
        self.rollout.recache()
        self.direction.rebuilt()

    @property
    def next_block(self) -> int | None:
        """The next block to be handed out; None where that is not known or there is none."""
        return self._ready[0][0] if self._ready else self.rollout.next_block

    def state_dict(self, *, latents_only: bool = False) -> dict[str, Any]:
        """Where the stream stands, for `load_state_dict` on one opened the same way."""
        ready = [
            (block, latents.to("cpu" if latents_only else latents.device, copy=True))
            for block, latents in self._ready
        ]
        return {
            "rollout": self.rollout.state_dict(latents_only=latents_only),
            "direction": self.direction.state_dict(on_cpu=latents_only),
            "ready": ready,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream stood."""
        self.rollout.check_state(state["rollout"])
        self.direction.load_state_dict(state["direction"])
        self.rollout.load_state_dict(state["rollout"])
        device = self.rollout.cache.device
        self._ready = deque((block, latents.to(device)) for block, latents in state["ready"])


class Stream:
    """Video frames block by block: an iterator and a context manager.

    Each item is uint8 `[n, H, W, 3]` on the CPU, in order; a block is handed out before the next
    one is computed, so that a change of prompt is heard at once. Nothing writes to it afterwards:
    from a GPU it is copied to pinned memory, which is used again once nobody holds it. Without a
    prefix n is 9 for a first block of 3 latent frames, then 12. After an error within a step the
    stream stands before that block, and can be asked for it again.
    `close` (or leaving the `with`) frees cache and decoder state; other streams are not touched.

    Where the VAE has a device of its own, a thread decodes: then `start_block` makes the next block
    while the one before is decoded.
    """

    def __init__(
        self,
        latents: LatentStream,
        decoder: StreamingDecoder,
        timeline: Timeline,
        *,
        seed: int,
        encode: Callable[[str], Tensor],
        weights: Callable[[], str],
        first_emitted_block: int = 0,
    ) -> None:
        """`encode` gives the text embeddings `[1, L, dim]` of a prompt.

        `timeline`: of a video of one scene. `weights` gives a name of the weights: a state goes on
        under the same ones alone.
        """
        self._latents: LatentStream | None = latents
        self._decoder = decoder
        self._timeline = timeline
        self._encode = encode
        self._weights = weights
        self._first_emitted_block = first_emitted_block
        apart = decoder.device != latents.rollout.cache.device
        self._thread = ThreadPoolExecutor(1, "decoder") if apart else None
        self.seed = seed
        self.next_index = 0
        self.measure: Measure = nullcontext

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
        """The engine behind the stream."""
        return self._open().rollout

    @property
    def timeline(self) -> Timeline:
        """Where blocks lie in the frames of the video, the frames of a prefix included."""
        return replace(self._timeline, scenes=self._open().direction.scenes)

    @property
    def changes(self) -> list[Change]:
        """The changes of prompt and seed that were made, in order."""
        return list(self._open().direction.changes)

    @property
    def pending(self) -> list[Change]:
        """The changes that will be made before the next window."""
        return self._open().direction.pending

    # --- frames ---------------------------------------------------------------------------------

    def next_block(self) -> Tensor | None:
        """Frames of the next block, uint8 `[n, H, W, 3]`; None when the video is complete."""
        batch = self.next_batch()
        return None if batch is None else batch[0]

    def next_batch(self) -> Tensor | None:
        """The same for every video of the batch: `[B, n, H, W, 3]`."""
        stream = self._open()
        while (item := stream.peek()) is not None:
            frames = self._decoded(*item)()
            self._take(item[0])
            if item[0] >= self._first_emitted_block:
                return frames
        return None

    @property
    def blocks_ahead(self) -> int:
        """Blocks that may be started before the frames of the first of them are asked for."""
        return 0 if self._thread is None else 1

    def start_block(self) -> Callable[[], Tensor] | None:
        """Make the next block; what waits for its frames is given, None when the video is complete.

        With a decoder apart from the generator the stream stands behind this block at once. An
        error of decoding then comes with the frames, and closes the decoder: nothing follows it.
        """
        stream = self._open()
        if self._thread is None:
            frames = self.next_block()
            return None if frames is None else lambda: frames
        while (item := stream.peek()) is not None:
            decoded = self._decoded(*item, decode=self._decode_ahead)
            self._take(item[0])
            if item[0] >= self._first_emitted_block:
                return lambda: decoded()[0]
            decoded()
        return None

    def settle(self) -> None:
        """Wait until all that was started is decoded; its errors come with its frames."""
        self._in_order(lambda: None)()

    def close(self) -> None:
        """Free everything the stream holds; it cannot be used afterwards. Idempotent."""
        self._latents = None
        if self._thread is not None:
            self._thread.shutdown()
        self._decoder.close()

    def _take(self, block: int) -> None:
        self._open().take()
        self.next_index = block + 1

    # --- direction ------------------------------------------------------------------------------

    def set_prompt(
        self,
        prompt: str | None,
        policy: Policy = "keep",
        blend_blocks: int = 0,
        *,
        row: int | None = None,
        seed: int | None = None,
        text: Tensor | None = None,
        replaces: bool = True,
    ) -> Change:
        """Another prompt before the next window; what the policies do is told in `Change`.

        `row`: of a batch, the only video that hears it. `seed`: a new one, for blocks that have not
        begun; with None for `prompt` that alone changes. `text`: the prompt's embeddings
        `[1, L, dim]`, if they are there already.

        Changes before one window are made in their order; one that another `replaces` before it was
        heard becomes `superseded`. Raises UserError, before anything changes, for one that is not
        possible.
        """
        stream = self._open()
        if seed is not None:
            seed = inputs.seed_of(seed, self.seed)
        if prompt is not None:
            (prompt,) = inputs.texts([prompt])
            text = self._encode(prompt) if text is None else self._embeddings(text)
        return stream.add(
            text,
            prompt=prompt,
            policy=policy,
            blend_blocks=blend_blocks,
            row=row,
            seed=seed,
            replaces=replaces,
        )

    @property
    def can_go_on(self) -> bool:
        """Whether it can make another block: a decoder that cannot go back ends with an error."""
        return self._latents is not None and self._decoder.is_open

    @property
    def num_bytes(self) -> int:
        """Memory of its cache, its prompt as the network sees it, and its decoder's state."""
        if self._latents is None:
            return 0
        rollout = self._latents.rollout
        text = (*rollout.text.keys, *rollout.text.values)
        return rollout.cache.num_bytes + sum(x.nbytes for x in text) + self._decoder.num_bytes

    def _embeddings(self, text: Any) -> Tensor:
        return inputs.embeddings(text, self.rollout.dit.config, "text")

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Cache, text, blocks in flight, decoder and position: tensors and plain values."""
        state = self._state(self._open().state_dict())
        return state | {"decoder": self._in_order(self._decoder.state_dict)()}

    def branch_state(self) -> dict[str, Any]:
        """A small state: clean latents that are stored and blocks in flight, on the CPU.

        A stream that loads it makes its cache anew (`Rollout.recache`), and its decoder by decoding
        the newest `WARM_UP_FRAMES` of these latents; so does `rebuild`, at the same place.
        """
        return self._state(self._open().state_dict(latents_only=True))

    def rebuild(self) -> None:
        """Make cache and decoder anew from what a `branch_state` holds."""
        self._open()
        self._warm_up()
        self._open().rebuild()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the stream that gave `state` stood.

        This stream must have been opened with the same seed, weights, schedule and sizes; otherwise
        ValueError, before anything changes.
        """
        if not isinstance(state, Mapping) or not state.keys() >= STREAM_KEYS:
            raise ValueError("this is no state of a stream: give what state_dict returned")
        if state["seed"] != self.seed:
            raise ValueError(f"this state has seed {state['seed']}, the stream {self.seed}")
        if state["weights"] != self._weights():
            raise ValueError("this state was made with other weights, or in another dtype")
        self._decoder.check_state(state.get("decoder", {}))
        self._open().load_state_dict(state["latents"])
        if "decoder" in state:
            self._in_order(self._decoder.load_state_dict, state["decoder"])()
        else:
            self._warm_up()
            self._open().direction.rebuilt()
        self.next_index = state["next_index"]

    def _state(self, latents: dict[str, Any]) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "weights": self._weights(),
            "next_index": self.next_index,
            "latents": latents,
        }

    def _warm_up(self) -> None:
        latents = self._open().rollout.recent_latents(WARM_UP_FRAMES)
        self._in_order(self._warm_up_on, latents)()

    def _warm_up_on(self, latents: Tensor) -> None:
        self._decoder.restart()
        if latents.shape[1]:
            self._decoder.decode(latents)

    def _decoded(
        self,
        block: int,
        latents: Tensor,
        *,
        decode: Callable[[int, Tensor, bool], Tensor] | None = None,
    ) -> Callable[[], Tensor]:
        """What gives the frames of a block; on another device they are being made already."""
        begins = block > 0 and block in self._open().direction.scenes
        if self._thread is not None:  # from here, so that it waits for nothing that comes later
            latents = latents.to(self._decoder.device)
        return self._in_order(decode or self._decode, block, latents, begins)

    def _in_order(self, work: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        """What gives the result of `work` on the decoder, which a thread may be at already."""
        if self._thread is None:
            return lambda: work(*arguments)
        return self._thread.submit(work, *arguments).result

    def _decode_ahead(self, block: int, latents: Tensor, begins: bool) -> Tensor:
        """The same of a block behind which the stream stands already."""
        try:
            return self._decode(block, latents, begins)
        except BaseException:
            self._decoder.close()
            raise

    @torch.no_grad()
    def _decode(self, block: int, latents: Tensor, begins: bool) -> Tensor:
        """Frames on the CPU; raises UserError where they are made of NaN or Inf.

        `begins`: with this block a scene does.
        """
        with self._decoder.undone_by_errors():
            if begins:
                self._decoder.restart()
            with self.measure("decode"):
                video = self._decoder.decode(latents)
            with self.measure("copy"):
                finite = torch.stack([_extent(latents), _extent(video)]).isfinite()
                frames, numbers = to_host(to_uint8(video).contiguous(), finite)
        if not all(numbers.tolist()):
            what = "frames" if numbers[0] else "latents"
            raise UserError(f"block {block} has {what} that are not numbers {NOT_FINITE}")
        return frames

    def _open(self) -> LatentStream:
        if self._latents is None:
            raise RuntimeError("this stream is closed: open another one")
        return self._latents


def directed(
    stream: Stream, changes: Sequence[Change], text: Callable[[str], Tensor]
) -> Iterator[Tensor]:
    """Blocks of a stream, uint8 `[n, H, W, 3]`, with `changes` made where they were recorded.

    A block may be decoded while the next one is made already (see `Stream.start_block`). `text`
    gives the embeddings of a prompt. Raises UserError for one whose block has gone by.
    """
    waiting = deque(changes)
    started: deque[Callable[[], Tensor]] = deque()
    while True:
        while waiting and waiting[0].block <= stream.next_index:
            change = waiting.popleft()
            if change.block < stream.next_index:
                raise UserError(f"block {change.block} was there before its prompt could change")
            if change.policy == BRANCH:
                stream.rebuild()
                continue
            prompt = change.prompt
            stream.set_prompt(
                prompt,
                change.policy,
                change.blend_blocks,
                seed=change.seed,
                text=None if prompt is None else text(prompt),
                replaces=False,  # all of these were made
            )
        coming = stream.start_block()
        if coming is not None:
            started.append(coming)
        while len(started) > (0 if coming is None else stream.blocks_ahead):
            yield started.popleft()()
        if coming is None:
            return


def _extent(values: Tensor) -> Tensor:
    """Largest less smallest value, float32, on its device: a number only if all of them are."""
    low, high = torch.aminmax(values.float())
    return high - low
