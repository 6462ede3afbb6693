"""Sessions: one viewer's video without an end, directed while it is made, saved and branched."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pipeline.changes import Change, Policy, Timeline
from pipeline.memory import readable
from pipeline.records import Record, chained_hash, describe_video, video_settings_of
from pipeline.states import read_state, state_bytes, write_state
from pipeline.stream import Stream
from pipeline.text_to_video import VideoPipeline
from utils.errors import UserError
from utils.files import require_space, write_json, written_folder

logger = logging.getLogger(__name__)

VERSION = 1  # of a saved session
MAX_BRANCH_POINTS = 64
SESSION_FILE, STATE_FILE = "session.json", "state.safetensors"

SessionState = Literal["playing", "paused", "stopped", "ended", "closed"]


@dataclass(frozen=True)
class Block:
    """Frames uint8 `[n, H, W, 3]` on the CPU, the first of which is number `first_frame`.

    `applied`: the changes that took hold before this block was made.
    """

    index: int
    frames: Tensor
    first_frame: int
    applied: tuple[Change, ...] = ()


@dataclass(frozen=True)
class BranchPoint:
    """A place from which a video can go on otherwise: before `block`, which begins at `frame`.

    It holds clean latents and blocks in flight (`Stream.branch_state`), and what was shown so far.
    """

    id: int
    block: int
    frame: int
    seconds: float
    num_bytes: int
    state: Mapping[str, Any] = field(repr=False)
    frames_hash: str = field(repr=False)


class Session:
    """One viewer's stream: prompts, play and pause, branch points, an exact copy on the disk.

    One thread at a time may call it. What it shows is a function of config, weights, seed and
    `changes`, which `record` puts down for `inference.py --replay`. An error within `step` leaves
    it before that block, and `step` may be called again.
    """

    def __init__(
        self, pipe: VideoPipeline, prompt: str, stream: Stream, video_frames: int | None
    ) -> None:
        """See `start`, `load` and `branch`. `prompt`: the one that the video began with."""
        self.pipe = pipe
        self.first_prompt = prompt
        self.video_frames = video_frames
        self.fps = pipe.setup.fps
        self.state: SessionState = "playing"
        self.frames_made = 0
        self.branch_points: list[BranchPoint] = []
        self._stream = stream
        self._hash = ""
        self._points_taken = 0
        self._told = 0  # of the changes that were made, those that a block has told of

    @classmethod
    def start(
        cls,
        pipe: VideoPipeline,
        prompt: str,
        *,
        seed: int | None = None,
        seconds: float | None = None,
        text: Tensor | None = None,
    ) -> Self:
        """A video from its beginning; without `seconds` it has no end.

        `text`: the embeddings `[1, L, dim]` of the prompt, if they are there already.
        """
        frames = None if seconds is None else _frames_in(seconds, pipe.setup.fps)
        text = pipe.encode_prompts([prompt]) if text is None else text
        return cls(pipe, prompt, _open(pipe, text, seed), frames)

    @property
    def seed(self) -> int:
        """The seed that the video began with."""
        return self._stream.seed

    @property
    def prompt(self) -> str:
        """What the next window hears, or is on its way to."""
        said = [*self._stream.changes, *self._stream.pending] if self._is_open else []
        return next((c.prompt for c in reversed(said) if c.prompt is not None), self.first_prompt)

    @property
    def changes(self) -> list[Change]:
        """What was changed, in order."""
        return self._stream.changes

    @property
    def timeline(self) -> Timeline:
        """Where blocks lie in the frames."""
        return self._stream.timeline

    @property
    def next_block(self) -> int:
        """The block that `step` makes next."""
        return self._stream.next_index

    @property
    def num_bytes(self) -> int:
        """Memory of the stream and, on the CPU, of the branch points."""
        return self.stream_bytes + sum(point.num_bytes for point in self.branch_points)

    @property
    def stream_bytes(self) -> int:
        """Memory of the stream alone, on the device of the model."""
        return self._stream.num_bytes if self._is_open else 0

    @property
    def can_go_on(self) -> bool:
        """Whether another step may succeed after one that failed."""
        return self._is_open and self._stream.can_go_on

    # --- course ---------------------------------------------------------------------------------

    def play(self) -> None:
        """Go on after a pause."""
        self._require_open()
        if self.state == "paused":
            self.state = "playing"

    def pause(self) -> None:
        """Make nothing until `play`."""
        self._require_open()
        if self.state == "playing":
            self.state = "paused"

    def stop(self) -> None:
        """The video ends here; it can still be branched and recorded."""
        self._require_open()
        if self.state != "ended":
            self.state = "stopped"

    def close(self) -> None:
        """Free the memory of everything; idempotent."""
        self.state = "closed"
        self._stream.close()
        self.branch_points.clear()

    def step(self) -> Block | None:
        """The next block; None when the session is not playing, or the video is over."""
        if self.state != "playing":
            return None
        frames = self._stream.next_block()
        assert frames is not None, "a stream without a length has no end"
        if self.video_frames is not None:
            frames = frames[: self.video_frames - self.frames_made]
        made = self._stream.changes
        block = Block(
            self._stream.next_index - 1, frames, self.frames_made, tuple(made[self._told :])
        )
        self._told = len(made)
        self.frames_made += len(frames)
        self._hash = chained_hash(self._hash, frames)
        if self.frames_made == self.video_frames:
            self.state = "ended"
        else:
            try:
                self._take_branch_point()
            except (RuntimeError, MemoryError) as error:  # the block counts more
                logger.warning("no branch point before block %d: %s", block.index + 1, error)
        return block

    def set_prompt(
        self,
        prompt: str | None,
        policy: Policy = "keep",
        blend_blocks: int = 0,
        *,
        seed: int | None = None,
        text: Tensor | None = None,
    ) -> Change:
        """Another prompt, or seed, before the next window; see `Stream.set_prompt`."""
        self._require_open()
        if self.state in ("stopped", "ended"):
            raise UserError("this video has ended: branch it, or start another one")
        return self._stream.set_prompt(prompt, policy, blend_blocks, seed=seed, text=text)

    def view(self) -> dict[str, Any]:
        """What the next window sees and makes: latent frames of the sink and of the recent past,
        counted in the whole video, and `[block, level]` of the window.
        """
        rollout = self._stream.rollout
        coming = next(p for p in rollout.plan.passes(rollout.index) if p.window is not None)
        part = coming.parts[-1]
        assert part.window is not None
        begin = rollout.layout.start(rollout.plan.origin)
        sink_frames = rollout.plan.policy.sink_frames
        return {
            "sink": [begin + frame for frame in part.view.frames if frame < sink_frames],
            "recent": [begin + frame for frame in part.view.frames if frame >= sink_frames],
            "window": [[block, level] for block, level in part.window],
            "levels": rollout.plan.schedule.num_levels,
            "block_frames": rollout.layout.block_frames,
        }

    # --- branches -------------------------------------------------------------------------------

    def branch(
        self,
        point: BranchPoint,
        prompt: str | None = None,
        seed: int | None = None,
        *,
        policy: Policy = "keep",
        text: Tensor | None = None,
    ) -> "Session":
        """Another session that goes on from a branch point, with another prompt or seed.

        It has the parent's changes up to there. Its cache and decoder are made anew by the rule of
        `Stream.rebuild`, which is recorded as a change of its own.
        """
        self._require_open()
        if not any(point is own for own in self.branch_points):
            raise UserError(f"this session has no branch point {point.id}; take one that it lists")
        stream = _open(self.pipe, None, self.seed)
        try:
            stream.load_state_dict(point.state)
            session = Session(self.pipe, self.first_prompt, stream, self.video_frames)
            session._hash = point.frames_hash
            session.frames_made = point.frame
            session._told = len(stream.changes)
            session._take_branch_point()
            if prompt is not None or seed is not None:
                session.set_prompt(prompt, policy, seed=seed, text=text)
        except BaseException:
            stream.close()
            raise
        return session

    def _take_branch_point(self) -> None:
        state = self._stream.branch_state()
        block = self._stream.next_index
        frame = self.frames_made
        self._points_taken += 1
        self.branch_points.append(
            BranchPoint(
                self._points_taken,
                block,
                frame,
                frame / self.fps,
                state_bytes(state),
                state,
                self._hash,
            )
        )
        if len(self.branch_points) > MAX_BRANCH_POINTS:
            del self.branch_points[least_needed([point.block for point in self.branch_points])]

    # --- on the disk ----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the session into a new folder, exactly: `load` goes on bit for bit.

        Branch points are left out. Raises UserError where there is no room for it, or something
        else than a saved session.
        """
        self._require_open()
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / SESSION_FILE).is_file():
            raise UserError(f"{folder} holds no saved session but other files; give a new folder")
        state = self._stream.state_dict()
        size = state_bytes(state)
        require_space(folder, size, f"this session takes {readable(size)}")
        logger.info("saving a session of %s to %s", readable(size), folder)
        described = {
            "version": VERSION,
            "first_prompt": self.first_prompt,
            "state": self.state,
            "frames_made": self.frames_made,
            "video_frames": self.video_frames,
            "points_taken": self._points_taken,
            "told": self._told,
            "frames_hash": self._hash,
        }
        with written_folder(folder) as partial:
            write_state(state, partial / STATE_FILE)
            write_json(partial / SESSION_FILE, described)
        return folder

    @classmethod
    def load(
        cls,
        pipe: VideoPipeline,
        folder: str | Path,
        *,
        prompt: str | None = None,
        seed: int | None = None,
        policy: Policy = "keep",
    ) -> Self:
        """Go on where a saved session stood, bit for bit, or from there on otherwise.

        Raises UserError for what is no saved session, or one of other weights or sizes.
        """
        described = _described(Path(folder) / SESSION_FILE)
        state = read_state(Path(folder) / STATE_FILE)
        stream = _open(pipe, None, state.get("seed"))
        try:
            try:
                stream.load_state_dict(state)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{folder} cannot go on here: {error}") from error
            session = cls(pipe, described["first_prompt"], stream, described["video_frames"])
            session.state = described["state"]
            session.frames_made = described["frames_made"]
            session._points_taken = described["points_taken"]
            session._told = described["told"]
            session._hash = described["frames_hash"]
            if prompt is not None or seed is not None:
                session.set_prompt(prompt, policy, seed=seed)
        except BaseException:
            stream.close()
            raise
        return session

    def record(self) -> Record:
        """What made the video so far, for `inference.py --replay`; the form is that of a batch."""
        changes = self.changes[: self._told]
        return describe_video(
            self.pipe.setup,
            self.pipe.source,
            prompt=self.first_prompt,
            seed=self.seed,
            number=0,
            frames=self.frames_made,
            latent_frames=None,
            frames_hash=self._hash,
            settings=video_settings_of(
                self.pipe.model_settings,
                prompt=self.first_prompt,
                seed=self.seed,
                sample=0,
                latent_frames=None,
                video_frames=self.frames_made,
                changes=[change.record() for change in changes],
            ),
            changes=changes,
        )

    @property
    def _is_open(self) -> bool:
        return self.state != "closed"

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("this session is closed: start another one")


def least_needed(blocks: Sequence[int]) -> int:
    """Which of rising places can go: the gap it leaves is small for its distance from the last.

    The first and the last stay.
    """
    now = blocks[-1]

    def cost(i: int) -> float:
        return (blocks[i + 1] - blocks[i - 1]) / (now - blocks[i])

    return min(range(1, len(blocks) - 1), key=cost)


def _open(pipe: VideoPipeline, text: Tensor | None, seed: int | None) -> Stream:
    """A stream whose steps can be repeated; without `text` it is to take a state."""
    if text is None:  # on the device of those that the state holds: blends go on bit for bit
        text = torch.zeros(1, 1, pipe.dit.config.text_dim, device=pipe.device)
    return pipe.open_stream(text, seed=seed, repeatable=True)


def _frames_in(seconds: float, fps: int) -> int:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 1 / fps <= seconds < 1e7:  # NaN is no such number either
        raise UserError(f"seconds must be a number from one frame on, not {seconds!r}")
    return round(seconds * fps)


def _described(path: Path) -> dict[str, Any]:
    """What `Session.save` wrote beside the state; UserError for anything else."""
    forms: dict[str, Any] = {
        "version": int,
        "first_prompt": str,
        "state": str,
        "frames_made": int,
        "video_frames": int | None,
        "points_taken": int,
        "told": int,
        "frames_hash": str,
    }
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable description of a session") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise UserError(f"{path} is not of a session that this version ({VERSION}) can read")
    if not all(name in found and isinstance(found[name], form) for name, form in forms.items()):
        raise UserError(f"{path} is no description of a session; save it again")
    return found
