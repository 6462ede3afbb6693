"""Sessions that share one model: turns, places, idleness, and the threads that do the work.

The event loop decides, threads work: one takes steps (and whatever else touches a session of the
engine), one encodes texts, two encode and read video, one writes mp4 files. So whoever asks the
server something is answered while a step runs.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.changes import Policy
from pipeline.session import Session
from server.engine import Engine, Request, in_words, take_step
from server.live import LiveSession, Reason
from server.protocol import Branch, ProtocolError, Start, Update
from server.recording import Recording
from server.storage import Storage
from utils.devices import release_memory
from utils.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOUSEKEEPING = 1.0  # seconds
SESSIONS_PER_ADDRESS = 4


@dataclass(frozen=True)
class PoolOptions:
    """How many sessions there may be, and how long they stay.

    `lead`: seconds made ahead of what was played. `idle_seconds`: without any socket.
    """

    max_sessions: int = 4
    sessions_per_address: int = SESSIONS_PER_ADDRESS
    lead: float = 1.5
    idle_seconds: float = 60.0


class SessionPool:
    """All sessions of a server. Its coroutines and methods belong to one event loop."""

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        options: PoolOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.storage, self.options, self.clock = engine, storage, options, clock
        self._words = partial(in_words, advice=engine.advice)
        self._live: dict[str, LiveSession] = {}
        self._turns: deque[LiveSession] = deque()
        self._starting: list[str] = []  # addresses of sessions that are being begun
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[Any]] = set()  # what a shutdown waits for
        self._leaving: dict[str, asyncio.Task[asyncio.Task[None]]] = {}  # see `_freeing`
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._steps = ThreadPoolExecutor(1, "steps")
        self._texts = ThreadPoolExecutor(1, "texts")
        self._media = ThreadPoolExecutor(2, "media")
        self._files = ThreadPoolExecutor(1, "files")

    async def __aenter__(self) -> "SessionPool":
        self._spawn(self._take_turns())
        self._spawn(self._keep_house())
        return self

    async def __aexit__(self, *_: object) -> None:
        for live in list(self._live.values()):
            await self.close(live, "shutdown")
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in (self._steps, self._texts, self._media, self._files):
            executor.shutdown(wait=False)

    # --- sessions --------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """Sessions that hold memory."""
        return len(self._live)

    def find(self, name: str) -> LiveSession | None:
        """A session by its id."""
        return self._live.get(name)

    async def start(self, asked: Start, address: str) -> LiveSession:
        """A new session; ProtocolError if there is no place, or it cannot be begun."""
        began_at, engine = self.clock(), self.engine

        async def begin(name: str) -> LiveSession:
            text = await self._in(self._texts, engine.encode, asked.prompt)
            make = partial(engine.start, asked.prompt, asked.seed, asked.seconds, text, asked.sink)
            recording = await self._in(
                self._media, Recording, self.storage, name, engine.size, engine.fps
            )
            live = await self._open(name, make, recording, address, asked.policy)
            live.began_at = began_at
            return live

        return await self._begin(begin, address)

    async def branch(self, parent: LiveSession, asked: Branch, address: str) -> LiveSession:
        """A new session from a snapshot of another one; ProtocolError as `start`.

        The other one stays while there is room for both.
        """
        point = parent.points.get(asked.snapshot)
        if point is None:
            raise ProtocolError("unknown_snapshot", f"there is no snapshot {asked.snapshot} now")

        async def begin(name: str) -> LiveSession:
            text = None
            if asked.prompt is not None:
                text = await self._in(self._texts, self.engine.encode, asked.prompt)
            policy = asked.policy or parent.policy
            make = partial(
                parent.session.branch, point, asked.prompt, asked.seed, policy=policy, text=text
            )
            recording = await self._in(
                self._media, Recording.of_branch, parent.recording, name, point.frame
            )
            live = await self._open(name, make, recording, address, parent.policy)
            live.inherit(parent, point.frame)
            return live

        live = await self._begin(begin, address, instead_of=parent)
        parent.left = True
        if self.sessions > self.options.max_sessions:
            self._spawn(self.close(parent, "room"), self._closing)
        return live

    def update(self, live: LiveSession, asked: Update) -> None:
        """Take a change and have its text encoded; ProtocolError if it comes too late."""
        live.accept(asked)
        self._spawn(self._encode(live, asked))

    def wake(self) -> None:
        """Something has changed that may allow another turn."""
        self._wake.set()

    async def close(self, live: LiveSession, reason: Reason) -> None:
        """End a session, free its memory, and leave its video and record on the disk."""
        if live.name in self._live:
            await asyncio.shield(await asyncio.shield(self._freeing(live, reason)))

    def _freeing(self, live: LiveSession, reason: Reason) -> asyncio.Task[asyncio.Task[None]]:
        """What ends a session and frees its memory, begun now or before: it gives what finishes
        its files. Both go on whoever waits for them; until it is done the session has its place.
        """
        if live.name not in self._leaving:
            self._leaving[live.name] = self._spawn(self._free(live, reason), self._closing)
        return self._leaving[live.name]

    async def _free(self, live: LiveSession, reason: Reason) -> asyncio.Task[None]:
        with suppress(ValueError):
            self._turns.remove(live)
        live.stop(reason)
        record = None
        try:
            record = await self.record_of(live)
        except Exception:  # its video is kept all the same
            logger.exception("session %s has no record", live.name)
        try:
            await self._in(self._steps, live.session.close)
            live.forget_points()
            if reason == "out_of_memory":
                await self._in(self._steps, release_memory)
        finally:
            del self._live[live.name], self._leaving[live.name]
        return self._spawn(self._finish(live, record), self._closing)

    async def _finish(self, live: LiveSession, record: dict[str, Any] | None) -> None:
        if delivery := self._deliveries.pop(live.name, None):
            await self._delivered(live, delivery)
        try:
            await self._in(self._files, live.recording.finish, record)
        except (UserError, OSError) as error:
            logger.error("not all of session %s was kept: %s", live.name, error)

    async def record_of(self, live: LiveSession) -> dict[str, Any]:
        """The record of a session: what makes its video again."""
        return await self._in(self._steps, live.session.record)

    async def saved_video(self, live: LiveSession) -> Path:
        """An mp4 of all that was made so far."""
        return await self._in(self._files, live.recording.save)

    async def read(self, work: Callable[[int], list[bytes]], most: int) -> list[bytes]:
        """Have a reader of a recording read."""
        return await self._in(self._media, work, most)

    # --- places ----------------------------------------------------------------------------------

    async def _begin(
        self,
        begin: Callable[[str], Awaitable[LiveSession]],
        address: str,
        *,
        instead_of: LiveSession | None = None,
    ) -> LiveSession:
        """A session in a place of its own, or in that of another one which will leave."""
        await self._make_room(address, instead_of)
        self._starting.append(address)
        try:
            live = await begin(secrets.token_hex(16))
        except ProtocolError:
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("a session could not be begun")
            raise ProtocolError("start_failed", self._words(error)) from error
        finally:
            self._starting.remove(address)
        self._live[live.name] = live
        self._turns.append(live)
        self._deliveries[live.name] = self._spawn(self._deliver(live))
        return live

    async def _open(
        self,
        name: str,
        make: Callable[[], Session],
        recording: Recording,
        address: str,
        policy: Policy,
    ) -> LiveSession:
        try:
            session = await self._in(self._steps, make)
        except BaseException:
            recording.discard()
            raise
        engine, options = self.engine, self.options
        return LiveSession(
            name,
            session,
            recording,
            address=address,
            policy=policy,
            lead=options.lead,
            block_seconds=engine.block_frames / engine.fps,
            clock=self.clock,
            words=self._words,
        )

    async def _make_room(self, address: str, stays: LiveSession | None) -> None:
        """Close what may give way while there is no place; ProtocolError if nothing may.

        `stays` leaves its place later, and is not closed here.
        """
        leaving = 0 if stays is None else 1
        most, own = self.options.max_sessions, self.options.sessions_per_address
        while len(self._live) + len(self._starting) - leaving >= most:
            if not await self._close_one(lambda live: live is not stays):
                text = f"all {most} places are taken; try again when somebody leaves"
                raise ProtocolError("full", text)
        while self._of(address) - leaving >= own:
            if not await self._close_one(
                lambda live: live is not stays and live.address == address
            ):
                text = f"{own} sessions are open from your address already; stop one of them"
                raise ProtocolError("too_many_sessions", text)

    def _of(self, address: str) -> int:
        running = sum(live.address == address for live in self._live.values())
        return running + self._starting.count(address)

    async def _close_one(self, may: Callable[[LiveSession], bool]) -> bool:
        """Close a session that is over, else one that was left for a branch; whether one was."""
        lives = [live for live in self._live.values() if may(live)]
        over = sorted((live for live in lives if live.ending), key=lambda live: not live.stopped)
        left = [live for live in lives if live.left and live.client is None]
        for live in (over + left)[:1]:
            await asyncio.shield(self._freeing(live, "room"))
            return True
        return False

    # --- what runs all the time ------------------------------------------------------------------

    async def _take_turns(self) -> None:
        while True:
            live = self._next_turn()
            if live is None:
                await self._wake.wait()
                self._wake.clear()
                continue
            requests = live.begin_turn()
            try:
                live.end_turn(await self._in(self._steps, take_step, live.session, requests))
            except Exception as error:  # of ours: what a model raises is told in the step
                live.end_turn(error)
            if live.broken is not None:
                self._spawn(self.close(live, live.broken), self._closing)

    def _next_turn(self) -> LiveSession | None:
        """The session whose turn it is: whoever had one goes to the end of the row."""
        chosen = None
        for live in self._turns:
            if live.wants_turn() and chosen is None:  # all are asked: waiting is measured
                chosen = live
        if chosen is not None:
            self._turns.remove(chosen)
            self._turns.append(chosen)
        return chosen

    async def _deliver(self, live: LiveSession) -> None:
        loop = asyncio.get_running_loop()
        grown = partial(loop.call_soon_threadsafe, live.grown)
        while True:
            step = await live.steps.get()
            live.announce(step)
            try:
                thumbnails = await self._in(self._media, live.record_block, step, grown)
            except Exception as error:
                live.failed(error)
            else:
                live.delivered(step, thumbnails)
            self.wake()

    async def _delivered(self, live: LiveSession, delivery: asyncio.Task[None]) -> None:
        """Wait for what is on its way to the recording, then end the delivery."""
        while (live.in_turn or live.undelivered) and not delivery.done():
            await asyncio.sleep(0.01)
        delivery.cancel()

    async def _encode(self, live: LiveSession, asked: Update) -> None:
        """A change of seed alone waits in the same row, so that changes keep their order."""
        encode = self.engine.encode
        try:
            text = await self._in(
                self._texts, lambda: None if asked.prompt is None else encode(asked.prompt)
            )
        except Exception as error:
            logger.warning("a prompt could not be encoded", exc_info=error)
            live.add_request(asked.id, ProtocolError("refused", self._words(error), asked.id))
            return
        live.add_request(
            asked.id,
            Request(
                asked.id,
                asked.prompt,
                asked.seed,
                asked.policy or live.policy,
                asked.blend_blocks,
                text,
            ),
        )
        self.wake()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING)
            self._spawn(self._keep_house_once())  # a session that waits to close holds nobody up

    async def _keep_house_once(self) -> None:
        try:
            await self.keep_house()
        except Exception:
            logger.exception("housekeeping failed")

    async def keep_house(self) -> None:
        """Close what was alone for too long; tell the others how they stand."""
        alone = []
        for live in list(self._live.values()):
            if live.client is not None:
                live.tell(live.stats())
            elif live.name in self._leaving:
                continue
            elif self.clock() - live.alone_since >= self.options.idle_seconds:
                alone.append(live)
        for live in alone:
            await self.close(live, "idle")

    # --- threads ---------------------------------------------------------------------------------

    async def _in(self, executor: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *args)

    def _spawn(
        self, work: Coroutine[Any, Any, T], tasks: set[asyncio.Task[Any]] | None = None
    ) -> asyncio.Task[T]:
        tasks = self._tasks if tasks is None else tasks
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task
