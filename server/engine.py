"""A model that makes videos, and what a session does in one turn.

Everything here runs in threads: texts are encoded in one, sessions are touched in another.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pipeline import VideoPipeline
from pipeline.changes import Change, Policy, Timeline
from pipeline.memory import what_fits
from pipeline.session import Block, BranchPoint, Session
from pipeline.setup import Setup
from utils.devices import is_out_of_memory
from utils.errors import UserError


class Engine(Protocol):
    """What the server needs of a model."""

    size: tuple[int, int]  # height, width
    fps: int
    block_frames: int  # video frames of a block behind the first

    def encode(self, prompt: str) -> Tensor:
        """Text embeddings `[1, L, dim]`."""
        ...

    def start(
        self,
        prompt: str,
        seed: int | None,
        seconds: float | None,
        text: Tensor,
        sink: int | None = None,
    ) -> Session:
        """A new session; `sink`: latent frames of its attention sink, by default the model's."""
        ...

    def advice(self) -> str:
        """What whoever runs the server can do where memory ends."""
        ...


class PipelineEngine:
    """The engine of a `VideoPipeline`."""

    def __init__(self, pipe: VideoPipeline) -> None:
        policy = pipe.setup.policy
        own = policy.sink_frames
        # What a viewer may choose from: an average needs frames that it is kept in.
        self.sinks = (own, 0) if own and policy.sink_ema is None else (own,)
        self._pipe, self._pipes = pipe, {own: pipe}
        self.size = pipe.shape.height, pipe.shape.width
        self.fps = pipe.setup.fps
        self.block_frames = pipe.layout.block_frames * pipe.shape.strides.time

    def encode(self, prompt: str) -> Tensor:
        """See `Engine`."""
        self._pipe.encode_negative()  # here, not in the thread of the steps
        return self._pipe.encode_prompts([prompt])

    def start(
        self,
        prompt: str,
        seed: int | None,
        seconds: float | None,
        text: Tensor,
        sink: int | None = None,
    ) -> Session:
        """See `Engine`; UserError for a sink that is not one of `sinks`."""
        pipe = self._pipe if sink is None else self._with_sink(sink)
        return Session.start(pipe, prompt, seed=seed, seconds=seconds, text=text)

    @property
    def setup(self) -> Setup:
        """What its videos are made by."""
        return self._pipe.setup

    def advice(self) -> str:
        """See `Engine`."""
        return what_fits(self.setup)

    def _with_sink(self, frames: int) -> VideoPipeline:
        if frames not in self.sinks:
            raise UserError(f"sink must be one of {', '.join(map(str, self.sinks))} latent frames")
        if frames not in self._pipes:
            self._pipes[frames] = self._pipe.variant([f"model_kwargs.sink_size={frames}"])
        return self._pipes[frames]


@dataclass(frozen=True)
class Request:
    """A change that is to be made before the next step; `id` is the client's own."""

    id: str
    prompt: str | None
    seed: int | None
    policy: Policy
    blend_blocks: int
    text: Tensor | None


@dataclass(frozen=True)
class Step:
    """What came of a turn; the event loop reads this and never the session itself.

    `asked`: changes that were taken, by the ids of their requests. `refused`: ids and the sentence
    why. `applied`: changes that took effect with the block, and what is told of each. `error`: the
    exception that the step ended in, if it did. `can_go_on`: whether another step may succeed.
    """

    block: Block | None
    asked: tuple[tuple[str, Change], ...]
    refused: tuple[tuple[str, str], ...]
    applied: tuple[tuple[Change, dict[str, Any]], ...]
    points: tuple[BranchPoint, ...]
    view: dict[str, Any]
    frames_made: int
    num_bytes: int
    error: Exception | None
    can_go_on: bool


def take_step(session: Session, requests: Sequence[Request]) -> Step:
    """Make the changes, then the next block. What goes wrong is told in the result."""
    asked: list[tuple[str, Change]] = []
    refused: list[tuple[str, str]] = []
    for request in requests:
        try:
            change = session.set_prompt(
                request.prompt,
                request.policy,
                request.blend_blocks,
                seed=request.seed,
                text=request.text,
            )
        except Exception as error:
            refused.append((request.id, in_words(error)))
        else:
            asked.append((request.id, change))
    block, failed = None, None
    try:
        block = session.step()
    except Exception as error:
        failed = error
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # which hold what the step had made
    changes = () if block is None else block.applied
    line = session.timeline
    return Step(
        block=block,
        asked=tuple(asked),
        refused=tuple(refused),
        applied=tuple((change, told_of(change, line, session.fps)) for change in changes),
        points=tuple(session.branch_points),
        view=session.view(),
        frames_made=session.frames_made,
        num_bytes=session.num_bytes,
        error=failed,
        can_go_on=failed is None or session.can_go_on,
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


def in_words(error: Exception, advice: Callable[[], str] | None = None) -> str:
    """An exception as a sentence for a client: its own words only where they are meant for it.

    `advice`: see `Engine`.
    """
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        otherwise = f", or start the server otherwise: {advice()}" if advice else ""
        return (
            f"there is too little memory for this now; try again when fewer people watch{otherwise}"
        )
    return f"this failed ({type(error).__name__}); the server's log says more"
