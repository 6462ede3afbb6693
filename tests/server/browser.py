"""A server of a model, and what a viewer sees of its page in a real browser."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline import VideoPipeline
from pipeline.session import Session
from server.access import Access
from server.app import AppOptions, about_model, build_app
from server.engine import PipelineEngine
from server.models import read_composer, warm_up
from server.pool import PoolOptions, SessionPool
from server.storage import Storage
from tests.server.fakes import served

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]

PREFIX = "/some/prefix/"
SHARE = """([r, g, b]) => {
  const shown = ['still', 'video', 'frames'].map((id) => document.getElementById(id))
    .find((e) => !e.hidden && (e.videoWidth ?? e.width));
  if (!shown) return 0;
  const canvas = new OffscreenCanvas(64, 64);
  const context = canvas.getContext('2d');
  context.drawImage(shown, 0, 0, 64, 64);
  const { data } = context.getImageData(0, 0, 64, 64);
  let near = 0;
  for (let i = 0; i < data.length; i += 4)
    near += Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 90;
  return near / (data.length / 4);
}"""
BUFFERED = """() => {
  const { buffered } = document.getElementById('video');
  return buffered.length ? [buffered.start(0), buffered.end(buffered.length - 1)] : [0, 0];
}"""


class SlowEngine(PipelineEngine):
    """The engine of a pipeline; `delay` seconds are added to each block."""

    delay = 0.0

    def start(self, *args: Any) -> Session:
        session = super().start(*args)
        step = session.step

        def slow_step() -> Any:
            time.sleep(self.delay)
            return step()

        session.step = slow_step  # type: ignore[method-assign]
        return session


@dataclass(frozen=True)
class LiveServer:
    """A server that runs, and what a test may look at or change of it."""

    port: int
    engine: SlowEngine
    pool: SessionPool

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def live_server(pipe: VideoPipeline, folder: Path, examples: Sequence[str]) -> Iterator[LiveServer]:
    """A server of a model in a thread of this process, by the code that `app.py` runs."""
    engine = SlowEngine(pipe)
    warm_up(engine)
    options = PoolOptions(max_sessions=8, sessions_per_address=8, idle_seconds=2.0)
    pool = SessionPool(engine, Storage(folder, 10**9), options)
    about = about_model(
        title="Rolling Forcing",
        model=pipe.setup.folder.path.name if pipe.setup.folder else "",
        in_flight=pipe.setup.levels.num - 1,
        sinks=[],
        examples=examples,
        composer=read_composer(pipe.setup),
    )
    access = Access(frozenset({"127.0.0.1", "localhost"}), None)
    with served(with_prefix(build_app(pool, AppOptions(access, about=about)))) as port:
        yield LiveServer(port, engine, pool)


def with_prefix(app: ASGIApp) -> ASGIApp:
    """The application; by the name localhost it is at PREFIX alone, as a proxy might offer it."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope.get("headers", ())).get(b"host", b"").startswith(b"localhost"):
            inside = scope["path"].startswith(PREFIX)
            path = "/" + scope["path"].removeprefix(PREFIX) if inside else "/v1/nothing"
            scope = {**scope, "path": path}
        await app(scope, receive, send)

    return answer


class Screen:
    """A page in a browser, as its viewer uses it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(10_000)
        page.on("console", lambda m: m.type in ("error", "warning") and self.errors.append(m.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#composer > *")

    def say(self, **words: str) -> None:
        """Choose words of the sentence."""
        for slot, word in words.items():
            self.page.select_option(f".sentence select[aria-label={slot}]", word)

    def start(self, *, seed: int = 3, **words: str) -> None:
        """Start a video and wait until it plays."""
        self.say(**words)
        self.page.fill("#seed", str(seed))
        self.page.click("#submit")
        self.wait_state("playing")

    def change(self, policy: str, **words: str) -> None:
        """Ask for another prompt."""
        self.say(**words)
        self.page.check(f"input[name=policy][value={policy}]")
        self.page.click("#submit")

    @property
    def session(self) -> str:
        """The id of the video."""
        return self.page.get_attribute("#mp4", "download").removesuffix(".mp4")

    @property
    def state(self) -> str | None:
        return self.page.get_attribute("body", "data-state")

    def wait_state(self, state: str, timeout: float = 10) -> None:
        self.page.wait_for_selector(f"body[data-state={state}]", timeout=1000 * timeout)

    @property
    def seconds(self) -> float:
        """The clock of the video."""
        return self.page.evaluate("document.getElementById('video').currentTime")

    @property
    def buffered(self) -> list[float]:
        """From when to when there is media."""
        return self.page.evaluate(BUFFERED)

    def share(self, colour: tuple[int, int, int]) -> float:
        """Part of the picture on screen that has a colour."""
        return self.page.evaluate(SHARE, list(colour))

    def until(self, true: Callable[[], bool], timeout: float, step: float = 0.05) -> float:
        """Wait until something holds; the seconds it took."""
        began = time.monotonic()
        while not true():
            waited = time.monotonic() - began
            assert waited < timeout, f"not within {timeout} s"
            self.page.wait_for_timeout(1000 * step)
        return time.monotonic() - began

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def overflow(self) -> float:
        """Pixels by which the page is wider than the window."""
        root = "document.documentElement"
        return self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth")
