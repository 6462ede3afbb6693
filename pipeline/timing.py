"""How long the parts of a stream take: what `scripts/benchmark.py` measures.

The stream of `pipeline` itself is timed, to uint8 frames in host memory, VAE and clean passes
included. `SteadyState` says from which block on all blocks are alike. Blocks are timed as a whole
first, with nothing between their parts; then others of the same stream in parts.
"""

import hashlib
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.passes import Pass, Plan
from pipeline.random_weights import random_text
from pipeline.stream import Stream, directed
from pipeline.text_to_video import VideoPipeline
from utils.background import Background
from utils.video import VideoWriter
from wan.context import CachedContext
from wan.dit import DiTConfig
from wan.flops import pass_flops

T = TypeVar("T")

MOST_BLOCKS_IN_PARTS = 20  # enough for a mean
MOST_BLOCKS_ENCODED = 5  # kept in memory to be encoded alone
BLOCKS_FOR_P99 = 100
STATUS, FORGETS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux
SECONDS_BETWEEN_LINES = 1.0


# --- clocks --------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of named parts: CUDA events on a GPU, where nothing waits for them; else a clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._open: tuple[str, Any] | None = None
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def start(self, name: str) -> None:
        """A part begins; those of `start` and `stop` do not overlap."""
        self._open = name, self._now()

    def stop(self) -> None:
        """The part that began last ends."""
        assert self._open is not None
        name, begin = self._open
        self._spans[name].append((begin, self._now()))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Around one part."""
        begin = self._now()
        yield
        self._spans[name].append((begin, self._now()))

    def seconds(self, name: str) -> list[float]:
        """Every duration of a part."""
        if not self._on_gpu:
            return [end - begin for begin, end in self._spans[name]]
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) / 1000 for begin, end in self._spans[name]]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@contextmanager
def in_parts(stream: Stream, passes: Stopwatch, decoding: Stopwatch) -> Iterator[None]:
    """Meanwhile the watches are told the parts of the stream's blocks.

    `passes` hears of `window` and `clean`, `decoding` of `decode` and `copy`, of as many blocks. A
    clean pass that shares its forward with a window is part of `window`.
    """

    def before(dit: nn.Module, arguments: tuple[Any, ...]) -> None:
        context = arguments[3]  # latents, timesteps, text, context
        alone = isinstance(context, CachedContext) and context.destination is not None
        passes.start("clean" if alone else "window")

    dit = stream.rollout.dit
    hooks = [
        dit.register_forward_pre_hook(before),
        dit.register_forward_hook(lambda *_: passes.stop()),
    ]
    stream.settle()  # a block that was begun before is in no part
    stream.measure = decoding.measure
    try:
        yield
        stream.settle()
    finally:
        stream.measure = nullcontext
        for hook in hooks:
            hook.remove()


@contextmanager
def shown(dit: nn.Module, blocks: int) -> Iterator[Callable[[], object]]:
    """Blocks on stderr, counted by what is yielded; and passes, which can take minutes each."""
    with tqdm(total=blocks, desc="blocks", miniters=0, mininterval=SECONDS_BETWEEN_LINES) as bar:
        passes = 0

        def begins(*_: object) -> None:
            nonlocal passes
            passes += 1
            bar.set_postfix_str(f"pass {passes}", refresh=False)
            bar.update(0)

        hook = dit.register_forward_pre_hook(begins)
        try:
            yield bar.update
        finally:
            hook.remove()


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of the GPU: the most that was allocated, then reserved; and what is allocated now.

    Without a GPU those of the process: the most that was resident, and what is resident now.
    """

    peak: int
    reserved: int | None
    held: int | None

    @classmethod
    def of(cls, device: torch.device) -> "Memory":
        """Since the start, or the last `forget_peak`."""
        if device.type == "cuda":
            cuda = torch.cuda
            return cls(
                cuda.max_memory_allocated(device),
                cuda.max_memory_reserved(device),
                cuda.memory_allocated(device),
            )
        said = STATUS.read_text() if STATUS.is_file() else ""
        kibibytes = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", said))
        if "VmHWM" in kibibytes:
            return cls(1024 * int(kibibytes["VmHWM"]), None, 1024 * int(kibibytes["VmRSS"]))
        unit = 1 if sys.platform == "darwin" else 1024
        return cls(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None, None)

    @staticmethod
    def forget_peak(device: torch.device) -> None:
        """The peaks are from now on those of what comes; without a GPU on Linux alone."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif FORGETS.exists():
            with suppress(OSError):  # not allowed in every container
                FORGETS.write_text("5")


# --- a viewer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Viewing:
    """What a viewer sees of blocks that come in: how often playing waited for one, and how long."""

    fps: float
    buffer_blocks: int
    misses: int
    stall_seconds: float

    @classmethod
    def of(cls, intervals: Sequence[float], frames: float, fps: float, buffer: int) -> "Viewing":
        """Blocks of `frames` that take these seconds, played at `fps`.

        Playing begins when `buffer` blocks are there. A block that is not there when the one before
        it was shown is a miss; what follows is shown so much later.
        """
        arrivals = list(accumulate(intervals))
        due, misses, stalled = arrivals[min(buffer, len(arrivals)) - 1], 0, 0.0
        for arrival in arrivals:
            if arrival > due:
                misses += 1
                stalled += arrival - due
                due = arrival
            due += frames / fps
        return cls(fps, buffer, misses, stalled)


# --- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SteadyState:
    """Where every pass sees a full context: from block `first` on; `passes` of one such block."""

    first: int
    passes: list[Pass]

    @classmethod
    def of(cls, plan: Plan) -> "SteadyState":
        """The first repetition of a plan without end."""
        start = plan.first_repetition()
        found = (plan.at(index) for index in range(start, start + plan.period))
        passes = [own for own in found if own is not None]
        return cls(max(own.parts[-1].blocks[0] for own in passes if own.parts), passes)

    def flops(self, sizes: DiTConfig, tokens: int, *, window: bool) -> int:
        """Operations of all forwards with a window, or of all that are clean passes alone."""
        return sum(
            pass_flops(sizes, part.view, tokens)
            for own in self.passes
            if (own.window is not None) == window
            for part in own.parts
        )


@dataclass(frozen=True)
class Asked:
    """What is to be measured: blocks that are not counted, blocks that are, minutes behind them.

    `file`: an mp4 that further blocks are written to.
    """

    skipped: int
    blocks: int
    minutes: float = 0
    file: Path | None = None


@dataclass(frozen=True)
class Late:
    """The last blocks of a long run: seconds of each, and how many there were before."""

    block: list[float]
    blocks_before: int
    memory: Memory


@dataclass(frozen=True)
class Filed:
    """Blocks that were written to a file meanwhile: seconds of each, and of ending the file.

    A wait for an encoder that is behind is in its block. `encoding`: seconds a block when nothing
    else is done, the ending included.
    """

    block: list[float]
    ending: float
    encoding: float


@dataclass(frozen=True)
class Measured:
    """Seconds of the measured blocks, and what surrounds them.

    `block`: from the request to frames on the host. `parts` and `block_in_parts`: of other blocks.
    `checksum`: SHA-256 of the frames of `block`.
    """

    block: list[float]
    frames: int
    checksum: str
    parts: dict[str, list[float]]
    block_in_parts: list[float]
    first_frame: dict[str, float]
    memory: Memory
    filed: Filed | None = None
    late: Late | None = None


class Counter:
    """Asks a stream for blocks, as a video in a file does, and times each until it is there.

    A VAE on a device of its own decodes meanwhile the block before.
    """

    def __init__(self, stream: Stream, count: Callable[[], object]) -> None:
        nothing: dict[str, Tensor] = {}  # nobody changes the prompt
        self._blocks = directed(stream, (), nothing.__getitem__)
        self._count = count
        self._seconds: list[float] = []

    def blocks(self, number: int) -> Iterator[Tensor]:
        """The next ones, uint8 `[n, H, W, 3]`."""
        for _ in range(number):
            yield self.block()

    def skip(self, number: int) -> None:
        """The next ones, which nobody looks at."""
        for _ in self.blocks(number):
            pass

    def block(self) -> Tensor:
        """The next one."""
        begin = time.perf_counter()
        frames = next(self._blocks)
        self._seconds.append(time.perf_counter() - begin)
        self._count()
        return frames

    def taken(self) -> list[float]:
        """The times since the last call."""
        found, self._seconds = self._seconds, []
        return found


def run(pipe: VideoPipeline, asked: Asked, last: Callable[[Stream], T]) -> tuple[Measured, T]:
    """Stream blocks as `asked`, give the stream to `last`; then start a second stream."""
    dit, device, text = pipe.dit, pipe.device, random_text(pipe)
    Memory.forget_peak(device)
    in_pieces = min(asked.blocks, MOST_BLOCKS_IN_PARTS)
    total = asked.skipped + asked.blocks + in_pieces + (asked.blocks if asked.file else 0)
    with shown(dit, total) as count:
        stream, cold = open_and_show(pipe, text)
        count()
        counter = Counter(stream, count)
        counter.skip(asked.skipped - 1)
        counter.taken()
        frames, checksum = hashed(counter.blocks(asked.blocks))
        whole, memory = counter.taken(), Memory.of(device)
        passes, decoding = Stopwatch(device), Stopwatch(pipe.vae.device)
        with in_parts(stream, passes, decoding):
            counter.skip(in_pieces)
        pieces, filed, late = counter.taken(), None, None
        if asked.file is not None:
            filed = write_blocks(counter, asked.blocks, asked.file, pipe.setup.fps)
        if asked.minutes:
            late = run_on(counter, asked, device)
    found = last(stream)
    stream.close()
    second, warm = open_and_show(pipe, text)
    second.close()
    measured = Measured(
        whole,
        frames,
        checksum,
        parts={
            **{name: passes.seconds(name) for name in ("window", "clean")},
            **{name: decoding.seconds(name) for name in ("decode", "copy")},
        },
        block_in_parts=pieces,
        first_frame={"cold": cold, "warm": warm},
        memory=memory,
        filed=filed,
        late=late,
    )
    return measured, found


def hashed(blocks: Iterable[Tensor]) -> tuple[int, str]:
    """How many frames there are in blocks uint8 `[n, H, W, 3]`, and their SHA-256."""
    digest, frames = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block.numpy().data)
        frames += len(block)
    return frames, digest.hexdigest()


def open_and_show(pipe: VideoPipeline, text: Tensor) -> tuple[Stream, float]:
    """A new stream, and the seconds from text embeddings to its first frames on the host."""
    begin = time.perf_counter()
    stream = pipe.open_stream(text)
    next(stream)
    return stream, time.perf_counter() - begin


def write_blocks(counter: Counter, blocks: int, path: Path, fps: float) -> Filed:
    """Write blocks to a file beside their making; then encode some of them again, alone."""
    kept: deque[Tensor] = deque(maxlen=MOST_BLOCKS_ENCODED)
    times = [time.perf_counter()]
    with VideoWriter(path, fps) as writer, Background() as beside:
        for block in counter.blocks(blocks):
            beside.do(partial(writer.write, block))
            kept.append(block)
            times.append(time.perf_counter())
        begin = times[-1]
    ending = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with VideoWriter(Path(folder) / "alone.mp4", fps) as writer:
            for block in kept:
                writer.write(block)
    encoding = (time.perf_counter() - begin) / len(kept)
    counter.taken()  # without the wait
    return Filed([end - start for start, end in pairwise(times)], ending, encoding)


def run_on(counter: Counter, asked: Asked, device: torch.device) -> Late:
    """Blocks for so many minutes; the memory and the times of the last ones."""
    end = time.monotonic() + 60 * asked.minutes
    Memory.forget_peak(device)
    last: deque[float] = deque(maxlen=asked.blocks)
    number = 0
    while time.monotonic() < end or number < asked.blocks:
        counter.block()
        last.extend(counter.taken())
        number += 1
    return Late(list(last), number - len(last), Memory.of(device))


def p50(seconds: Sequence[float]) -> float:
    """The median."""
    return statistics.median(seconds)


def p99(seconds: Sequence[float]) -> float | None:
    """What 99 of 100 stay below; None for fewer than that."""
    if len(seconds) < BLOCKS_FOR_P99:
        return None
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]
