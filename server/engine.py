"""What the server needs of a model: texts become embeddings, and sessions are begun.

A session is the pipeline's (`pipeline.session.Session`). Steps are taken in one thread, texts are
encoded in another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from utils.errors import UserError

if TYPE_CHECKING:
    from pipeline import VideoPipeline


class Timeline(Protocol):
    """Where blocks lie in the video."""

    def start(self, block: int) -> int:
        """First frame of a block."""
        ...


class Change(Protocol):
    """See `pipeline.changes.Change`."""

    block: int
    policy: str
    prompt: str | None
    seed: int | None
    first_block: int | None
    whole_from: int | None
    status: str


class BranchPoint(Protocol):
    """See `pipeline.session.BranchPoint`."""

    @property
    def id(self) -> int:
        """Of its session."""
        ...

    @property
    def frame(self) -> int:
        """Frames of the video before it."""
        ...


class Block(Protocol):
    """See `pipeline.session.Block`."""

    @property
    def index(self) -> int:
        """Its number."""
        ...

    @property
    def frames(self) -> Tensor:
        """uint8 `[n, H, W, 3]`."""
        ...

    @property
    def applied(self) -> Sequence[Change]:
        """Changes that took effect before it."""
        ...


class Session(Protocol):
    """See `pipeline.session.Session`."""

    seed: int
    prompt: str
    timeline: Timeline
    frames_made: int
    num_bytes: int
    branch_points: Sequence[BranchPoint]

    def step(self) -> Block | None:
        """The next block; None at the end."""
        ...

    def set_prompt(
        self,
        prompt: str | None,
        *,
        policy: str,
        blend_blocks: int,
        seed: int | None,
        text: Tensor | None,
    ) -> Change:
        """Another text or seed."""
        ...

    def branch(
        self, point: BranchPoint, prompt: str | None, seed: int | None, text: Tensor | None
    ) -> "Session":
        """A new session that begins at the point."""
        ...

    def record(self) -> dict[str, Any]:
        """What makes the same video again."""
        ...

    def view(self) -> dict[str, Any]:
        """What is in view."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Engine(Protocol):
    """A model that makes videos."""

    size: tuple[int, int]  # height, width
    fps: int
    block_frames: int  # video frames of a block behind the first

    def encode(self, prompt: str) -> Tensor:
        """Text embeddings `[1, L, dim]`."""
        ...

    def start(self, prompt: str, seed: int | None, seconds: float | None, text: Tensor) -> Session:
        """A new session."""
        ...


@dataclass(frozen=True)
class Asked:
    """A change that a client asked for under its own `id`."""

    id: str
    change: Change


@dataclass(frozen=True)
class Request:
    """A change that is to be made before the next step."""

    id: str
    prompt: str | None
    seed: int | None
    policy: str
    blend_blocks: int
    text: Tensor | None


@dataclass(frozen=True)
class Step:
    """What came of one turn: the thread of the steps hands it to the event loop.

    `applied`: what is told of each change that took effect, beside the change. `refused`: ids with
    the sentence why. `error`: the exception that the step ended in, if it did.
    """

    block: Block | None
    asked: tuple[Asked, ...]
    refused: tuple[tuple[str, str], ...]
    applied: tuple[tuple[Change, dict[str, Any]], ...]
    points: tuple[BranchPoint, ...]
    view: dict[str, Any]
    frames_made: int
    num_bytes: int
    error: Exception | None = None


def take_step(session: Session, requests: Sequence[Request], fps: int) -> Step:
    """Make the changes, then the next block; in the thread of the steps. Never raises."""
    asked: list[Asked] = []
    refused: list[tuple[str, str]] = []
    for request in requests:
        try:
            change = session.set_prompt(
                request.prompt,
                policy=request.policy,
                blend_blocks=request.blend_blocks,
                seed=request.seed,
                text=request.text,
            )
        except Exception as error:
            refused.append((request.id, in_words(error)))
        else:
            asked.append(Asked(request.id, change))
    block, failed = None, None
    try:
        block = session.step()
    except Exception as error:
        failed = error
    applied = () if block is None else block.applied
    return Step(
        block,
        tuple(asked),
        tuple(refused),
        tuple((change, told_of(change, session.timeline, fps)) for change in applied),
        tuple(session.branch_points),
        session.view(),
        session.frames_made,
        session.num_bytes,
        failed,
    )


def told_of(change: Change, timeline: Timeline, fps: int) -> dict[str, Any]:
    """What `session.prompt_update.applied` says of a change."""
    block = change.block if change.first_block is None else change.first_block
    frame = timeline.start(block)
    whole = None if change.whole_from is None else timeline.start(change.whole_from)
    return {
        "block": block,
        "frame": frame,
        "seconds": frame / fps,
        "whole_from_block": change.whole_from,
        "whole_from_frame": whole,
        "whole_from_seconds": None if whole is None else whole / fps,
        "prompt": change.prompt,
        "seed": change.seed,
        "policy": change.policy,
    }


def in_words(error: Exception) -> str:
    """An exception as a sentence for a client: its own words only where they are meant for it."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "the machine has too little memory for this now; try again when fewer people watch"
    return f"the step failed ({type(error).__name__}); the server's log says more"


class PipelineEngine:
    """The engine of a `VideoPipeline`."""

    def __init__(self, pipe: "VideoPipeline") -> None:
        self._pipe = pipe
        self.size = pipe.shape.height, pipe.shape.width
        self.fps = pipe.setup.fps
        self.block_frames = pipe.layout.block_frames * pipe.shape.strides.time

    def encode(self, prompt: str) -> Tensor:
        """See `Engine`."""
        return self._pipe.encode_prompts([prompt])

    def start(self, prompt: str, seed: int | None, seconds: float | None, text: Tensor) -> Session:
        """See `Engine`."""
        from server.shim import ShimSession

        return ShimSession(self._pipe, prompt, seed, seconds, text)
