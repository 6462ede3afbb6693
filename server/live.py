"""A session as its clients know it: who watches, what was asked, what was told.

All of it belongs to the event loop; the engine's session is touched by the thread of the steps
alone, and what comes of a turn arrives as a `Step`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from pipeline.changes import Change, Policy
from pipeline.session import BranchPoint, Session
from server.engine import Request, Step, in_words
from server.playback import Pace, Playback
from server.protocol import ProtocolError, Update
from server.recording import Recording, thumbnail
from utils.devices import is_out_of_memory
from utils.errors import UserError

logger = logging.getLogger(__name__)

State = Literal["playing", "paused", "stopped"]
Reason = Literal[
    "stopped",
    "ended",
    "disk_full",
    "recording_failed",
    "out_of_memory",
    "step_failed",
    "idle",
    "room",
    "shutdown",
]

BLOCKS_AT_ONCE = 2  # made and not yet encoded
CHANGES_AT_ONCE = 16  # asked for and not yet applied
KEPT_THUMBNAILS = 240
KEPT_CHANGES = 240  # told again to a client that comes back


class Client(Protocol):
    """A socket that controls a session."""

    sent_seconds: float

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, in order."""
        ...

    def show(self, recording: Recording, first_frame: int) -> None:
        """Send the video from a key frame on, what comes later, too."""
        ...

    def wake(self) -> None:
        """There is more to send."""
        ...

    def replaced(self) -> None:
        """Another client has taken over."""
        ...


class LiveSession:
    """One session: its state, its recording, and the client that controls it."""

    def __init__(
        self,
        name: str,
        session: Session,
        recording: Recording,
        *,
        address: str,
        policy: Policy,
        lead: float,
        block_seconds: float,
        clock: Callable[[], float],
        words: Callable[[Exception], str] = in_words,
    ) -> None:
        """`words`: an exception as a sentence for the client."""
        self.name, self.session, self.recording = name, session, recording
        self.address, self.policy, self.lead = address, policy, lead
        self.fps, self.block_seconds, self.clock = recording.fps, block_seconds, clock
        self.words = words
        self.seed, self.prompt = session.seed, session.first_prompt  # that the video begins with
        self.state: State = "playing"
        self.left = False  # for a branch: it gives way when there is no room
        self.client: Client | None = None
        self.playback: Playback | None = None
        self.alone_since = clock()
        self.began_at = clock()
        self.first_frame_ms: float | None = None
        self.frames_made = session.frames_made
        self.points: dict[int, BranchPoint] = {}
        self.pace = Pace()
        self.in_turn = False
        self.steps: asyncio.Queue[Step] = asyncio.Queue()
        self.undelivered = 0
        self._requests: deque[Request] = deque()
        self._asked: list[tuple[str, Change]] = []  # and not yet applied
        self._encoding: list[str] = []  # ids of changes whose text is not encoded yet
        self._unrecorded = False
        self._stop_reason: Reason | None = None
        self._wanted_at: float | None = None
        self._view: dict[str, Any] = {}
        self._num_bytes = session.num_bytes
        self._block = -1
        self._told_changes: deque[dict[str, Any]] = deque(maxlen=KEPT_CHANGES)
        self._thumbnails: list[dict[str, Any]] = []
        self._thumbnail_every = 1.0  # seconds

    # --- clients ---------------------------------------------------------------------------------

    def attach(self, client: Client, first: int, *, again: bool) -> None:
        """Let a client take over; what it has to know comes first, then the video from `first` on.

        `first`: a key frame. `again`: all that was told before is told once more.
        """
        if self.client is not None and self.client is not client:
            self.client.replaced()
        self.client, self.left = client, False
        self.playback = Playback(first / self.fps, self.clock())
        client.tell(self._started())
        if again:
            waiting = map(_accepted, self._unheard() + self._encoding)
            points = map(_available, self._shown_points())
            for message in (*self._told_changes, *waiting, *points, *self._thumbnails):
                client.tell(message)
        height, width = self.recording.size
        client.tell(
            {
                "type": "video.start",
                "width": width,
                "height": height,
                "fps": self.fps,
                "codec": self.recording.codec,
                "first_frame": first,
                "from_seconds": first / self.fps,
            }
        )
        client.show(self.recording, first)
        client.tell(self.stats())
        if self.state == "stopped":
            client.tell(self._stopped())

    def place(self, from_seconds: float | None) -> int:
        """The key frame to begin at for a client that comes back; None: where the last one was."""
        if from_seconds is None:
            from_seconds = self.playback.played if self.playback else 0.0
        return self.recording.key_frame_before(from_seconds)

    def detach(self, client: Client) -> None:
        """A client has gone."""
        if self.client is client:
            self.client = None
            self.alone_since = self.clock()

    def tell(self, message: dict[str, Any]) -> None:
        """Tell the client, if there is one."""
        if self.client is not None:
            self.client.tell(message)

    # --- what a client asks for ------------------------------------------------------------------

    def hear(self, seconds: float) -> None:
        """The client has played up to there."""
        if self.playback is None or self.client is None:
            return
        try:
            self.playback.hear(seconds, sent=self.client.sent_seconds, now=self.clock())
        except ValueError as error:
            raise ProtocolError("bad_playhead", str(error)) from error

    def hide(self, hidden: bool) -> None:
        """The page went out of sight, or came back."""
        if self.playback is not None:
            self.playback.hidden = hidden
            self.playback.heard_at = self.clock()

    def pause(self) -> None:
        """Make no more blocks for now."""
        self._require_running()
        self.state = "paused"
        self.tell({"type": "session.paused"})

    def resume(self) -> None:
        """Go on."""
        self._require_running()
        self.state = "playing"
        if self.playback is not None:
            self.playback.heard_at = self.clock()
        self.tell({"type": "session.resumed"})

    def stop(self, reason: Reason) -> None:
        """Make no more blocks at all; those that are being made still come."""
        if self.state != "stopped" and self._stop_reason is None:
            self._stop_reason = reason
            self._settle()

    def accept(self, update: Update) -> None:
        """A change is taken; its text may still have to be encoded (see `add_request`)."""
        self._require_running(update.id)
        waiting = len(self._unheard() + self._encoding)
        if waiting >= CHANGES_AT_ONCE:
            text = f"{waiting} changes wait for their turn already; wait for one to be applied"
            raise ProtocolError("busy", text, update.id)
        self._encoding.append(update.id)
        self.tell(_accepted(update.id))

    def add_request(self, id: str, request: Request | ProtocolError) -> None:
        """The text of a change is encoded, or could not be."""
        self._encoding.remove(id)
        if isinstance(request, ProtocolError):
            self.tell(request.reply())
        elif self.stopped:
            self._tell_unheard(id)
        else:
            self._requests.append(request)

    def _unheard(self) -> list[str]:
        """The changes that are encoded and not applied yet."""
        return [*(id for id, _ in self._asked), *(request.id for request in self._requests)]

    def _tell_unheard(self, id: str) -> None:
        text = "the video ended before this change was heard"
        self.tell(ProtocolError("stopped", text, id).reply())

    def _require_running(self, id: str | None = None) -> None:
        if self.state == "stopped" or self._stop_reason is not None:
            raise ProtocolError("stopped", "this session was stopped; start another one", id)

    # --- turns -----------------------------------------------------------------------------------

    @property
    def made_seconds(self) -> float:
        """Length of what was made."""
        return self.frames_made / self.fps

    @property
    def broken(self) -> Reason | None:
        """Why a step has ended it, if one has: what it holds is to be freed at once."""
        reason = self._stop_reason
        return reason if reason in ("out_of_memory", "step_failed") else None

    @property
    def ending(self) -> bool:
        """Whether no more blocks are begun; one that was may still come."""
        return self._stop_reason is not None

    @property
    def stopped(self) -> bool:
        """Whether it is over, and all of it is in the recording."""
        return self.state == "stopped"

    def wants_turn(self) -> bool:
        """Whether the next block is to be made now."""
        wanted = (
            self.state == "playing"
            and self._stop_reason is None
            and self.client is not None
            and self.playback is not None
            and not self.in_turn
            and self.undelivered < BLOCKS_AT_ONCE
            and self.playback.wants(
                self.made_seconds,
                block=self.block_seconds,
                takes=self.pace.seconds,
                lead=self.lead,
                now=self.clock(),
            )
        )
        if not wanted:
            self._wanted_at = None
        elif self._wanted_at is None:
            self._wanted_at = self.clock()
        return wanted

    def begin_turn(self) -> list[Request]:
        """The changes to make in this turn."""
        self.in_turn = True
        requests = list(self._requests)
        self._requests.clear()
        return requests

    def end_turn(self, step: Step | Exception) -> None:
        """What came of it: what fails is told at once, the block once it is encoded."""
        self.in_turn = False
        if isinstance(step, Exception):
            self._fail(step)
            self._settle()
            return
        self.frames_made, self._view, self._num_bytes = step.frames_made, step.view, step.num_bytes
        self._asked += step.asked
        for id, message in step.refused:
            self.tell(ProtocolError("refused", message, id).reply())
        for id, change in self._asked:
            if change.status == "superseded":
                self.tell({"type": "session.prompt_update.superseded", "id": id})
        self._asked = [asked for asked in self._asked if asked[1].status != "superseded"]
        if step.error is not None:
            self._fail(step.error, can_go_on=step.can_go_on)
        elif step.block is None:
            self.stop("ended")
        else:
            if self._wanted_at is not None:
                self.pace.add(self.clock() - self._wanted_at, len(step.block.frames))
            self._wanted_at = None
            if not self._unrecorded:
                self.undelivered += 1
                self.steps.put_nowait(step)
        self._settle()

    def _fail(self, error: Exception, *, can_go_on: bool = True) -> None:
        """A step failed: wait until the client says to go on, if the session can.

        Without memory none can.
        """
        logger.error("session %s: a step failed", self.name, exc_info=error)
        self.tell(ProtocolError("step_failed", self.words(error)).reply())
        if is_out_of_memory(error):
            self.stop("out_of_memory")
        elif not can_go_on:
            self.stop("step_failed")
        elif self.state == "playing" and self._stop_reason is None:
            self.pause()

    # --- delivery --------------------------------------------------------------------------------

    def record_block(self, step: Step, grown: Callable[[], None]) -> list[dict[str, Any]]:
        """Encode a block; the thumbnails in it. In a thread of the media; raises UserError."""
        assert step.block is not None
        frames, first = step.block.frames.numpy(), self.recording.frames
        self.recording.add(frames, grown)
        return [
            {"type": "thumbnail", "seconds": number / self.fps, "jpeg": thumbnail(frames[index])}
            for index, number in enumerate(range(first, first + len(frames)))
            if number % round(self._thumbnail_every * self.fps) == 0
        ]

    def announce(self, step: Step) -> None:
        """A block is about to be encoded: tell what changes with it."""
        for change, told in step.applied:
            id = next((id for id, asked in self._asked if asked is change), None)
            self._asked = [asked for asked in self._asked if asked[1] is not change]
            message = {"type": "session.prompt_update.applied", "id": id, **told}
            self._told_changes.append(message)
            self.tell(message)

    def grown(self) -> None:
        """A frame is in the recording."""
        if self.first_frame_ms is None:
            self.first_frame_ms = round(1000 * (self.clock() - self.began_at), 1)
        if self.client is not None:
            self.client.wake()

    def delivered(self, step: Step, thumbnails: Sequence[dict[str, Any]]) -> None:
        """A block is in the recording."""
        assert step.block is not None
        self.undelivered -= 1
        self._block = step.block.index
        for message in thumbnails:
            self._thumbnails.append(message)
            self.tell(message)
        if len(self._thumbnails) > KEPT_THUMBNAILS:
            self._thumbnails = self._thumbnails[::2]
            self._thumbnail_every *= 2
        self._tell_points({point.id: point for point in step.points})
        self.tell(self.stats())
        self._settle()

    def failed(self, error: Exception) -> None:
        """A block could not be recorded, so that nothing can follow it."""
        self._unrecorded = True
        self.undelivered = 0
        while not self.steps.empty():
            self.steps.get_nowait()
        code: Reason = "disk_full" if isinstance(error, UserError) else "recording_failed"
        logger.error("session %s: a block was not recorded", self.name, exc_info=error)
        self.tell(ProtocolError(code, self.words(error)).reply())
        self.stop(code)
        self._settle()

    def forget_points(self) -> None:
        """The session is closed: what its branch points held is free."""
        self._tell_points({})

    def _tell_points(self, points: dict[int, BranchPoint]) -> None:
        for id in self.points.keys() - points.keys():
            self.tell({"type": "snapshot.dropped", "id": id})
        added = [points[id] for id in points if id not in self.points]
        self.points = points
        for point in added:
            self.tell(_available(self._shown(point)))

    def _shown_points(self) -> list[tuple[int, float]]:
        return [self._shown(point) for point in self.points.values()]

    def _shown(self, point: BranchPoint) -> tuple[int, float]:
        return point.id, point.frame / self.fps

    def _settle(self) -> None:
        """Tell the end once nothing is on its way any more."""
        if self._stop_reason is None or self.stopped or self.in_turn or self.undelivered:
            return
        self.state = "stopped"
        for id in self._unheard():
            self._tell_unheard(id)
        self._requests.clear()
        self._asked.clear()
        self.tell(self.stats())
        self.tell(self._stopped())

    # --- messages --------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """The `stats` message."""
        played = self.playback.played if self.playback else 0.0
        watched = self.playback is not None and self.playback.watches(self.clock())
        waits = self.state == "playing" and not watched
        return {
            "type": "stats",
            "state": "waiting" if waits else self.state,
            "fps": round(self.pace.frames_per_second, 1),
            "lead": round(self.made_seconds - played, 3),
            "block": self._block,
            "frames": self.recording.frames,
            "seconds": self.recording.frames / self.fps,
            "memory_bytes": self._num_bytes,
            "first_frame_ms": self.first_frame_ms,
            "view": self._view,
        }

    def inherit(self, parent: "LiveSession", frames: int) -> None:
        """What was told of the first frames of a branch, which are its parent's."""
        seconds = frames / self.fps
        self._thumbnails = [m for m in parent._thumbnails if m["seconds"] < seconds]
        self._thumbnail_every = parent._thumbnail_every
        self._told_changes.extend(m for m in parent._told_changes if m["frame"] < frames)

    def _started(self) -> dict[str, Any]:
        height, width = self.recording.size
        return {
            "type": "session.started",
            "id": self.name,
            "seed": self.seed,
            "prompt": self.prompt,
            "policy": self.policy,
            "fps": self.fps,
            "width": width,
            "height": height,
            "frames": self.recording.frames,
            "state": self.state,
        }

    def _stopped(self) -> dict[str, Any]:
        return {
            "type": "session.stopped",
            "reason": self._stop_reason,
            "frames": self.recording.frames,
            "replay": f"python inference.py --replay {self.name}.json",
        }


def _accepted(id: str) -> dict[str, Any]:
    return {"type": "session.prompt_update.accepted", "id": id}


def _available(point: tuple[int, float]) -> dict[str, Any]:
    return {"type": "snapshot.available", "id": point[0], "seconds": point[1]}
