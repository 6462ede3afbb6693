"""A model without a network, a clock that stands still, and clients, for tests of the server."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from starlette.applications import Starlette
from torch import Tensor

from server.access import Access
from server.app import AppOptions, build_app
from server.listen import PING, listen, new_server
from server.pool import PoolOptions, SessionPool
from server.storage import Storage
from utils.errors import UserError

FPS = 16
BLOCK = 4  # video frames
SIZE = (16, 24)  # height, width


def colour(prompt: str) -> list[int]:
    """What a prompt looks like."""
    return list(hashlib.sha256(prompt.encode()).digest()[:3])


@dataclass
class FakeChange:
    block: int
    prompt: str | None
    policy: str
    seed: int | None
    blend_blocks: int = 0
    first_block: int | None = None
    whole_from: int | None = None
    status: str = "pending"


@dataclass(frozen=True)
class FakePoint:
    id: int
    block: int
    frame: int
    seconds: float
    num_bytes: int = 1


@dataclass(frozen=True)
class FakeBlock:
    index: int
    frames: Tensor
    first_frame: int
    applied: tuple[FakeChange, ...]


class FakeTimeline:
    def start(self, block: int) -> int:
        return block * BLOCK


class FakeSession:
    """See `pipeline.session.Session`: frames of one colour, that of the prompt."""

    def __init__(
        self, engine: "FakeEngine", prompt: str, seed: int, blocks: int | None, first: int = 0
    ) -> None:
        self.engine, self.prompt, self.seed, self.blocks = engine, prompt, seed, blocks
        self.first_prompt, self.fps = prompt, engine.fps
        self.timeline = FakeTimeline()
        self.num_bytes = self.stream_bytes = 1000
        self.can_go_on = True
        self.next = first
        self.changes: list[FakeChange] = []
        self.pending: list[FakeChange] = []
        self.branch_points: list[FakePoint] = []
        self.closed = False

    @property
    def frames_made(self) -> int:
        return self.next * BLOCK

    def step(self) -> FakeBlock | None:
        assert not self.closed
        self.engine.steps.append(self.prompt)
        if self.engine.step_seconds:
            time.sleep(self.engine.step_seconds)
        if self.engine.failures.get(self.prompt):
            raise self.engine.failures[self.prompt].popleft()
        if self.blocks is not None and self.next >= self.blocks:
            return None
        applied = tuple(self.pending)
        self.pending = []
        for change in applied:
            change.status = "applied"
            self.prompt = change.prompt or self.prompt
        self.changes += applied
        if self.engine.noise:
            frames = torch.randint(256, (BLOCK, *self.engine.size, 3), dtype=torch.uint8)
        else:
            pixels = torch.tensor(colour(self.prompt), dtype=torch.uint8)
            frames = pixels.expand(BLOCK, *self.engine.size, 3).contiguous()
        block = FakeBlock(self.next, frames, self.next * BLOCK, applied)
        self.next += 1
        points = [*self.branch_points, FakePoint(self.next, self.next, self.next * BLOCK, 0.0)]
        self.branch_points = points[-3:]
        return block

    def set_prompt(
        self,
        prompt: str | None,
        policy: str = "keep",
        blend_blocks: int = 0,
        *,
        seed: int | None = None,
        text: Tensor | None = None,
    ) -> FakeChange:
        if prompt == "refuse":
            raise UserError("this model cannot do that")
        for old in self.pending:
            old.status = "superseded"
        change = FakeChange(self.next, prompt, policy, seed, blend_blocks, self.next, self.next + 2)
        self.pending = [change]
        return change

    def branch(
        self,
        point: FakePoint,
        prompt: str | None = None,
        seed: int | None = None,
        *,
        policy: str = "keep",
        text: Tensor | None = None,
    ) -> "FakeSession":
        session = FakeSession(self.engine, self.prompt, self.seed, self.blocks, point.block)
        session.first_prompt = self.first_prompt
        self.engine.sessions.append(session)
        if prompt is not None:
            session.set_prompt(prompt, policy, seed=seed)
        return session

    def record(self) -> dict[str, Any]:
        if self.first_prompt == "no record":
            raise RuntimeError("the record broke")
        return {"seed": self.seed, "prompt": self.prompt, "frames": self.frames_made}

    def view(self) -> dict[str, Any]:
        return {"sink": [0], "recent": [], "window": [[self.next, 0]], "levels": 1}

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeEngine:
    """A model of `FakeSession`s.

    `noise`: frames that take many bytes. `steps`: whose steps were taken. `failures`: what those of
    a prompt raise, in order.
    """

    size: tuple[int, int] = SIZE
    fps: int = FPS
    block_frames: int = BLOCK
    step_seconds: float = 0.0
    encode_seconds: float = 0.0
    noise: bool = False
    steps: list[str] = field(default_factory=list)
    failures: dict[str, deque[Exception]] = field(default_factory=dict)
    encoded: list[str] = field(default_factory=list)
    sessions: list[FakeSession] = field(default_factory=list)

    def encode(self, prompt: str) -> Tensor:
        if prompt == "no text":
            raise RuntimeError("the text encoder broke")
        self.encoded.append(prompt)
        time.sleep(self.encode_seconds)
        return torch.zeros(1, 1, 1)

    def start(
        self,
        prompt: str,
        seed: int | None,
        seconds: float | None,
        text: Tensor,
        sink: int | None = None,
    ) -> FakeSession:
        if prompt == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        blocks = None if seconds is None else max(1, round(seconds * self.fps / BLOCK))
        session = FakeSession(self, prompt, 0 if seed is None else seed, blocks)
        self.sessions.append(session)
        return session

    def advice(self) -> str:
        return "--profile 12gb"


class FakeClock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeClient:
    """What a session tells, and all that was made counts as sent; or nothing, if it is slow."""

    def __init__(self, *, slow: bool = False) -> None:
        self.told: list[dict[str, Any]] = []
        self.slow = slow
        self.recording: Any = None
        self.first_frame = 0
        self.was_replaced = False

    @property
    def sent_seconds(self) -> float:
        if self.slow or self.recording is None:
            return self.first_frame / FPS
        return self.recording.frames / FPS

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def show(self, recording: Any, first_frame: int) -> None:
        self.recording, self.first_frame = recording, first_frame

    def wake(self) -> None:
        pass

    def replaced(self) -> None:
        self.was_replaced = True

    def heard(self, kind: str) -> list[dict[str, Any]]:
        """The messages of a type."""
        return [message for message in self.told if message["type"] == kind]


# --- servers -------------------------------------------------------------------------------------


def fake_app(folder: Path, engine: FakeEngine | None = None, **values: Any) -> Starlette:
    """A server of the fake model; fields of PoolOptions and AppOptions by name."""
    names = {item.name for item in fields(PoolOptions)}
    options = PoolOptions(**{k: values.pop(k) for k in names & values.keys()})
    disk = values.pop("disk", 10**8)
    static = folder / "static"
    static.mkdir(exist_ok=True)
    (static / "index.html").write_text("<title>page</title>", encoding="utf-8")
    access = values.pop("access", Access(frozenset({"testserver"}), None))
    app_options = AppOptions(access, static=static, **values)
    pool = SessionPool(engine or FakeEngine(), Storage(folder / "videos", disk), options)
    return build_app(pool, app_options)


@contextmanager
def served(app: Starlette, ping: float = PING) -> Iterator[int]:
    """The port of a server that runs in a thread, by the code that `app.py` runs."""
    with listen("127.0.0.1", 0) as listener:
        server = new_server(app, ping=ping)
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
