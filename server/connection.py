"""One WebSocket: what comes in becomes calls of the pool, what goes out waits in one row."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from server.live import LiveSession
from server.playback import Bucket
from server.pool import SessionPool
from server.protocol import (
    Attach,
    Branch,
    Format,
    Hidden,
    Limits,
    Message,
    Playhead,
    ProtocolError,
    Start,
    Update,
    Verb,
    parse,
)
from server.recording import JpegReader, Mp4Reader, Recording

logger = logging.getLogger(__name__)

FRAMES_AT_ONCE = 16  # of one read from the recording
SENT_AHEAD = 30.0  # seconds of video in a client that has not played them yet
WAITING = 1024  # messages that a client has not read yet
INBOX = 256  # messages of a client that wait while a session is begun; then no more is read
ENDED_FLOOD = 500  # messages above the rate before a socket is closed
Event = MutableMapping[str, Any]
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013


@dataclass(frozen=True)
class Rate:
    """Messages a client may send: a second, and at once."""

    per_second: float = 40.0
    burst: float = 80.0


class Connection:
    """A client of the pool (see `server.live.Client`): controls at most one session at a time."""

    def __init__(
        self,
        socket: WebSocket,
        pool: SessionPool,
        *,
        limits: Limits,
        rate: Rate,
        format: Format,
        address: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sent_seconds = 0.0
        self._socket, self._pool, self._limits = socket, pool, limits
        self._format, self._address, self._clock = format, address, clock
        self._live: LiveSession | None = None
        self._row: deque[dict[str, Any]] = deque()
        self._reader: Mp4Reader | JpegReader | None = None
        self._inbox: asyncio.Queue[tuple[float, Event]] = asyncio.Queue(INBOX)
        self._wake = asyncio.Event()
        self._bucket = Bucket(rate.per_second, rate.burst, clock())
        self._too_many = 0
        self._lost = False

    async def serve(self) -> None:
        """Accept the socket and live until it closes."""
        await self._socket.accept()
        tasks = [asyncio.create_task(work()) for work in (self._send_all, self._read_all)]
        try:
            while True:
                await self._receive()
        except WebSocketDisconnect:
            pass
        finally:
            self._leave()
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError, WebSocketDisconnect):
                    await task

    # --- client of a session ---------------------------------------------------------------------

    def tell(self, message: dict[str, Any]) -> None:
        """See `Client`; one that has not read the last `WAITING` messages is let go."""
        if len(self._row) < WAITING:
            self._row.append(message)
        else:
            self._lost = True
        self._wake.set()

    def show(self, recording: Recording, first_frame: int) -> None:
        """See `Client`."""
        reader = JpegReader if self._format == "jpeg" else Mp4Reader
        self._reader = reader(recording, first_frame)
        self.sent_seconds = first_frame / recording.fps
        self._wake.set()

    def wake(self) -> None:
        """See `Client`."""
        self._wake.set()

    def replaced(self) -> None:
        """See `Client`."""
        self._live, self._reader = None, None
        self.tell({"type": "session.replaced"})

    # --- out -------------------------------------------------------------------------------------

    async def _send_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._row or self._frames_to_send > 0:
                    if self._lost:
                        await self._close(TRY_AGAIN_LATER)
                        return
                    if self._row:
                        await self._socket.send_json(self._row.popleft())
                    else:
                        await self._send_video()
            except (WebSocketDisconnect, RuntimeError):
                return  # it is closed; the receiving side ends, too
            except Exception:
                logger.exception("video could not be sent")
                self._reader = None

    @property
    def _frames_to_send(self) -> int:
        """Of the next read; none where the client has yet to play what it has."""
        reader, playback = self._reader, self._live and self._live.playback
        if reader is None or not playback or not reader.ready:
            return 0
        last = (playback.played + SENT_AHEAD) * reader.recording.fps
        return min(FRAMES_AT_ONCE, int(last) - reader.next_frame)

    async def _send_video(self) -> None:
        reader = self._reader
        assert reader is not None
        messages = await self._pool.read(reader.read, self._frames_to_send)
        if reader is self._reader:  # before, since the answer may be here before `send` is back
            self.sent_seconds = reader.next_frame / reader.recording.fps
        for message in messages:
            if reader is not self._reader:
                return
            await self._socket.send_bytes(message)

    # --- in --------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        """Read on while a session is begun: in what nobody reads, no answer to a ping is heard."""
        event: Event = {}
        while event.get("type") != "websocket.disconnect":
            try:
                event = await self._socket.receive()
            except Exception:  # it is closed
                event = {"type": "websocket.disconnect"}
            await self._inbox.put((self._clock(), event))

    async def _receive(self) -> None:
        came_at, event = await self._inbox.get()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1000))
        if not self._bucket.take(came_at):
            await self._refuse_flood()
            return
        try:
            text = event.get("text")
            if text is None:
                raise ProtocolError("bad_json", "messages of a client are JSON texts, not binary")
            await self._obey(parse(text, self._limits))
        except ProtocolError as error:
            self.tell(error.reply())
        self._pool.wake()

    async def _refuse_flood(self) -> None:
        self._too_many += 1
        if self._too_many % 100 == 1:
            text = "you send more messages than are read; send fewer"
            self.tell(ProtocolError("too_many_messages", text).reply())
        if self._too_many >= ENDED_FLOOD:
            await self._close(POLICY_VIOLATION)
            raise WebSocketDisconnect(POLICY_VIOLATION)

    async def _obey(self, message: Message) -> None:
        match message:
            case Start():
                await self._start(message)
            case Attach():
                self._attach(message)
            case Branch():
                await self._branch(message)
            case Update():
                self._pool.update(self._session(message.id), message)
            case Verb("pause"):
                self._session().pause()
            case Verb("resume"):
                self._session().resume()
            case Verb():
                self._session().stop("stopped")
            case Playhead():
                self._session().hear(message.seconds)
                self._wake.set()
            case Hidden():
                self._session().hide(message.hidden)

    def _session(self, id: str | None = None) -> LiveSession:
        if self._live is None:
            raise ProtocolError("no_session", "start a session, or attach to one, first", id)
        return self._live

    async def _start(self, message: Start) -> None:
        if self._live is not None and not self._live.stopped:
            raise ProtocolError("already_started", "stop the session that runs here first")
        live = await self._pool.start(message, self._address)
        self._format = message.format or self._format
        self._control(live, 0, again=False)

    def _attach(self, message: Attach) -> None:
        live = self._pool.find(message.id)
        if live is None:
            text = "this session has ended, or there never was one; start another one"
            raise ProtocolError("unknown_session", text)
        self._control(live, live.place(message.from_seconds), again=True)

    async def _branch(self, message: Branch) -> None:
        parent = self._session()
        live = await self._pool.branch(parent, message, self._address)
        self._control(live, live.recording.frames, again=True)

    def _control(self, live: LiveSession, first: int, *, again: bool) -> None:
        self._leave()
        self._live = live
        live.attach(self, first, again=again)

    def _leave(self) -> None:
        if self._live is not None:
            self._live.detach(self)
        self._live, self._reader = None, None

    async def _close(self, code: int) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            with suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.close(code)
