"""How a live server feels: first frame, changes of prompt, frames per second, memory over time.

    python scripts/live_figures.py
    python scripts/live_figures.py --minutes 10 --json figures.json -- --config_path C

It starts `app.py` (with the flags behind `--`) in a process of its own, watches it as viewers do
and prints a table. A click is a `session.start` or `session.prompt_update` that is sent; a frame is
there when its bytes are. Between them lies no browser.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main
from utils.config import ROOT
from utils.errors import UserError
from utils.files import write_json

START_SECONDS = 300
LONGEST_WAIT = 120.0  # seconds for a message or a frame
Figures = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tries", type=int, default=5, help="of each click (default: 5)")
    parser.add_argument("--seconds", type=float, default=20, help="of each rate (default: 20)")
    parser.add_argument("--viewers", type=int, nargs="*", default=[1, 2, 4], help="(1 2 4)")
    parser.add_argument("--minutes", type=float, default=2, help="of memory (default: 2)")
    parser.add_argument("--killed", type=int, default=50, help="sessions to kill (default: 50)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


class Viewer:
    """A client that plays what it is sent in real time, or as fast as it comes."""

    def __init__(self, socket: Any, fps: int, *, eager: bool) -> None:
        self.socket, self.fps, self.eager = socket, fps, eager
        self.frames, self.told = 0, asyncio.Queue[dict[str, Any]]()
        self.refused = ""  # what the server said when it ended the session
        self.began: float | None = None
        self.arrivals: list[tuple[float, int]] = []  # (clock, frames that are there)
        self.held = 0.0  # seconds of video that playing stood still

    async def say(self, kind: str, **fields: Any) -> float:
        """Send a message; when that was."""
        await self.socket.send(json.dumps({"type": kind, **fields}))
        return time.monotonic()

    async def listen(self) -> None:
        """Keep what comes."""
        try:
            async for message in self.socket:
                if isinstance(message, bytes):
                    self.frames += message.count(b"moof")
                    self.arrivals.append((time.monotonic(), self.frames))
                    if self.frames and self.began is None:
                        self.began = time.monotonic()
                    continue
                told = json.loads(message)
                if told["type"] == "error" and not self.refused:
                    self.refused = f"the server says: {told['message']}"
                self.told.put_nowait(told)
        finally:
            self.refused = self.refused or "the server has closed the session"

    async def play(self) -> None:
        """Say ten times a second what was played: what is there, or what a clock has reached."""
        played = 0.0
        while True:
            there = self.frames / self.fps
            if self.eager:
                played = there
            elif self.began is not None:
                played += 0.1
                self.held += max(0.0, played - there)
                played = min(played, there)
            await self.say("playhead", seconds=played)
            await asyncio.sleep(0.1)

    async def until(self, kind: str) -> dict[str, Any]:
        """The next message of a type."""
        end = time.monotonic() + LONGEST_WAIT
        while True:
            while self.told.empty():
                await self._wait(kind, end)
            message = self.told.get_nowait()
            if message["type"] == kind:
                return message

    async def frame(self, number: int) -> float:
        """When frame `number` came; UserError if the session ends before."""
        end = time.monotonic() + LONGEST_WAIT
        while self.frames <= number:
            await self._wait(f"frame {number}", end)
        return next(at for at, frames in self.arrivals if frames > number)

    async def _wait(self, what: str, end: float) -> None:
        if self.refused:
            raise UserError(self.refused)
        if time.monotonic() > end:
            raise UserError(f"{what} did not come within {LONGEST_WAIT:g} s")
        await asyncio.sleep(0.002)


class Server(NamedTuple):
    """A server that answers: its port, its process, and what it says of itself."""

    port: int
    process: int
    prompts: Sequence[str]
    fps: int

    @property
    def socket(self) -> str:
        """Where sessions are."""
        return f"ws://127.0.0.1:{self.port}/v1/realtime/video"


@asynccontextmanager
async def viewer(server: Server, prompt: str, *, eager: bool = False) -> AsyncIterator[Viewer]:
    """A viewer of a new session."""
    from websockets.asyncio.client import connect

    async with connect(server.socket, max_size=2**24) as socket:
        watching = Viewer(socket, server.fps, eager=eager)
        tasks = [asyncio.create_task(watching.listen()), asyncio.create_task(watching.play())]
        try:
            await watching.say("session.start", prompt=prompt)
            yield watching
            await watching.say("session.stop")
            await watching.until("session.stopped")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


# --- what is measured ----------------------------------------------------------------------------


async def first_frame(server: Server, tries: int) -> Figures:
    """Seconds from `session.start` to the first frame."""
    taken, prompts = [], server.prompts
    for number in range(tries):
        async with viewer(server, prompts[number % len(prompts)]) as watching:
            begin = time.monotonic()
            taken.append(await watching.frame(0) - begin)
    return {"first_frame_s": statistics.median(taken), "first_frame_s_worst": max(taken)}


async def change(server: Server, policy: str, tries: int) -> Figures:
    """Seconds from `session.prompt_update` to its first frame: sent, and played."""
    sent, played, whole = [], [], []
    for number in range(tries):
        async with viewer(server, server.prompts[0]) as watching:
            await watching.frame(round((3 + 0.2 * number) * server.fps))
            click = await watching.say(
                "session.prompt_update", id="1", prompt=server.prompts[1], policy=policy
            )
            applied = await watching.until("session.prompt_update.applied")
            assert watching.began is not None
            sent.append(await watching.frame(applied["frame"]) - click)
            shown = watching.began + applied["seconds"] + watching.held
            played.append(max(shown - click, sent[-1]))
            whole.append(applied["whole_from_seconds"] - applied["seconds"])
    return {
        f"{policy}_sent_s": statistics.median(sent),
        f"{policy}_shown_s": statistics.median(played),
        f"{policy}_shown_s_worst": max(played),
        f"{policy}_whole_after_s": statistics.median(whole),
    }


async def rate(server: Server, viewers: int, seconds: float) -> Figures:
    """Frames per second that come to each of several viewers who play as fast as they can."""
    prompts = server.prompts

    async def watch(number: int) -> float:
        async with viewer(server, prompts[number % len(prompts)], eager=True) as watching:
            await watching.frame(0)
            await asyncio.sleep(2.0)
            before = watching.frames
            await asyncio.sleep(seconds)
            return (watching.frames - before) / seconds

    rates = await asyncio.gather(*(watch(number) for number in range(viewers)))
    return {f"fps_of_{viewers}": sum(rates), f"fps_of_{viewers}_least": min(rates)}


async def memory(server: Server, minutes: float) -> Figures:
    """MiB of the server at the beginning and at the end of a long session, and held seconds."""
    async with viewer(server, server.prompts[0]) as watching:
        await asyncio.sleep(min(15.0, 60 * minutes / 4))
        begin = resident(server.process)
        await asyncio.sleep(60 * minutes)
        held = watching.held
    end = resident(server.process)
    return {"rss_begin_mib": begin, "rss_end_mib": end, "stood_still_s": held}


async def killed(server: Server, count: int) -> Figures:
    """MiB of the server before and after sessions whose clients vanish."""
    from websockets.asyncio.client import connect

    async def kill(number: int) -> None:
        socket = await connect(server.socket)
        prompt = server.prompts[number % len(server.prompts)]
        await socket.send(json.dumps({"type": "session.start", "prompt": prompt}))
        async for message in socket:
            if isinstance(message, bytes) and b"moof" in message:
                break
        socket.transport.abort()

    figures: Figures = {}
    for name in ("before", "after"):
        for number in range(count):
            await kill(number)
            await asyncio.sleep(0.1)
        await asyncio.sleep(4.0)
        there = Path(f"/proc/{server.process}")
        figures[f"killed_{name}_mib"] = resident(server.process)
        figures[f"killed_{name}_threads"] = len(list((there / "task").iterdir()))
        figures[f"killed_{name}_files"] = len(list((there / "fd").iterdir()))
    return figures


def resident(process: int) -> float:
    """MiB of memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


# --- the server ----------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Start a server, watch it, print what was seen."""
    own, flags = list(argv), []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parse_command(build_parser(), own)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        place = ["--output_dir", folder, "--server_port", str(port), "--idle_seconds", "1"]
        command = [sys.executable, str(ROOT / "app.py"), *place, *flags]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as server:
            try:
                figures = asyncio.run(measure(args, server, port))
            finally:
                server.terminate()
    for name, value in figures.items():
        print(f"{name:24} {value:.2f}" if isinstance(value, float) else f"{name:24} {value}")
    if args.json is not None:
        write_json(args.json, figures)
    return 0


def free_port() -> int:
    """One that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def measure(args: argparse.Namespace, process: subprocess.Popen[bytes], port: int) -> Figures:
    """All figures."""
    config = await ready(process, port)
    server = Server(port, process.pid, config["examples"], config["fps"])
    if len(server.prompts) < 2:
        raise UserError("the server has no two example prompts to change between")
    figures: Figures = {"cores": len(os.sched_getaffinity(0)), "model": config["model"]}
    figures |= await first_frame(server, args.tries)
    for policy in config["policies"]:
        figures |= await change(server, policy, args.tries)
    for viewers in args.viewers:
        figures |= await rate(server, viewers, args.seconds)
    if args.minutes:
        figures |= await memory(server, args.minutes)
    if args.killed:
        figures |= await killed(server, args.killed)
    return figures


async def ready(process: subprocess.Popen[bytes], port: int) -> Figures:
    """What the server says of itself once it answers."""
    from urllib.request import urlopen

    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise UserError("app.py has ended; start it by hand to see why")
        try:
            with urlopen(f"http://127.0.0.1:{port}/v1/config") as answer:
                return json.load(answer)
        except OSError:
            await asyncio.sleep(1.0)
    raise UserError("app.py does not answer")


if __name__ == "__main__":
    sys.exit(run_main(main))
