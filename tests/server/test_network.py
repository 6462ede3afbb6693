"""The server on a real socket of this machine: clients that stall, vanish, or speak no protocol."""

import ctypes
import gc
import json
import resource
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from server.connection import Rate
from tests.server.fakes import FakeEngine, fake_app, served

BIG = (128, 128)


@contextmanager
def opened(port: int):
    with connect(f"ws://127.0.0.1:{port}/v1/realtime/video") as socket:
        yield socket


def say(socket, kind: str, **fields) -> None:
    socket.send(json.dumps({"type": kind, **fields}))


def until(socket, kind: str) -> dict:
    while True:
        message = socket.recv(timeout=5)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


def health(port: int) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/health", timeout=5) as answer:
        return json.load(answer)


def lasts(condition, seconds: float = 5.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_health_answers_during_a_slow_step(tmp_path):
    """A step in the event loop kept everybody waiting."""
    engine = FakeEngine(step_seconds=0.6)
    with served(fake_app(tmp_path, engine)) as port, opened(port) as socket:
        say(socket, "session.start", prompt="fox")
        until(socket, "session.started")
        taken = []
        while len(engine.steps) < 2:
            begin = time.monotonic()
            health(port)
            taken.append(time.monotonic() - begin)
        assert len(taken) > 5
        assert sorted(taken)[-2] < 0.1  # one hiccup of a busy machine is no blocked loop
        say(socket, "session.stop")


@pytest.mark.slow
def test_slow_reader(tmp_path):
    """It asks for a video, says that it plays it, and reads nothing: what is made stays bounded."""
    engine = FakeEngine(size=BIG, noise=True)
    app = fake_app(tmp_path, engine, lead=0.5, rate=Rate(1e5, 1e5))
    with served(app) as port, socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(handshake(port))
        raw.recv(1000)
        raw.sendall(masked({"type": "session.start", "prompt": "slow"}))
        made = -1
        while made < len(engine.steps):
            made = len(engine.steps)
            for _ in range(30):
                raw.sendall(masked({"type": "playhead", "seconds": 1e9}))
                time.sleep(0.01)
        with opened(port) as other:  # meanwhile others are served
            say(other, "session.start", prompt="fox")
            until(other, "thumbnail")
        assert engine.steps.count("slow") == made
        assert health(port)["sessions"] == 2


def handshake(port: int) -> bytes:
    return (
        f"GET /v1/realtime/video HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def masked(message: dict) -> bytes:
    """A text frame of a client, masked with zeros."""
    data = json.dumps(message).encode()
    assert len(data) < 126
    return bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 2000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"b" * 70000,
        b"POST /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /v1/realtime/video HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_no_http(garbage_port, data):
    with socket.create_connection(("127.0.0.1", garbage_port), timeout=2) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        answer = raw.recv(65536)
    assert not answer or answer.split(b" ")[1][:1] in b"45"
    assert health(garbage_port)["status"] == "ok"


FRAMES = {
    "no mask": bytes([0x81, 2]) + b"{}",
    "reserved bits": bytes([0xF1, 0x82, 0, 0, 0, 0]) + b"{}",
    "unknown opcode": bytes([0x83, 0x82, 0, 0, 0, 0]) + b"{}",
    "no UTF-8": bytes([0x81, 0x82, 0, 0, 0, 0]) + b"\xff\xfe",
    "a length of 2^62": bytes([0x81, 0xFF]) + (2**62).to_bytes(8) + bytes(4),
    "a message of 2 MiB": bytes([0x81, 0xFF]) + (2**21).to_bytes(8) + bytes(4) + bytes(2**21),
    "a long ping": bytes([0x89, 0xFE, 0, 200, 0, 0, 0, 0]) + bytes(200),
    "a fragment without beginning": bytes([0x80, 0x82, 0, 0, 0, 0]) + b"{}",
}


@pytest.mark.parametrize("data", FRAMES.values(), ids=FRAMES)
def test_broken_frames(garbage_port, data):
    with socket.create_connection(("127.0.0.1", garbage_port), timeout=2) as raw:
        raw.sendall(handshake(garbage_port))
        assert raw.recv(1000).startswith(b"HTTP/1.1 101")
        with suppress(ConnectionError):  # it may be refused before all of it is sent
            raw.sendall(data)
            while raw.recv(4096):
                pass
    assert health(garbage_port)["status"] == "ok"


@pytest.fixture(scope="module")
def garbage_port(tmp_path_factory):
    with served(fake_app(tmp_path_factory.mktemp("app"))) as port:
        yield port


@pytest.mark.slow
def test_client_that_vanishes(tmp_path):
    """It keeps its session for a while, so that it can come back; then the session is closed."""
    engine = FakeEngine()
    app = fake_app(tmp_path, engine, idle_seconds=1.2)
    with served(app) as port:
        raw = socket.create_connection(("127.0.0.1", port))
        raw.sendall(handshake(port))
        raw.recv(1000)
        raw.sendall(masked({"type": "session.start", "prompt": "fox"}))
        lasts(lambda: engine.steps)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        raw.close()  # with a reset, as a machine that lost its power is seen by its router
        assert health(port)["sessions"] == 1
        lasts(lambda: health(port)["sessions"] == 0)
        assert engine.sessions[0].closed


@pytest.mark.slow
def test_half_open_socket(tmp_path):
    """It answers no ping: whoever is gone without a word is noticed."""
    app = fake_app(tmp_path, idle_seconds=0.5)
    with served(app, ping=0.3) as port, socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(handshake(port))
        raw.recv(1000)
        raw.sendall(masked({"type": "session.start", "prompt": "fox"}))
        lasts(lambda: health(port)["sessions"] == 1)
        lasts(lambda: health(port)["sessions"] == 0)


def test_pings_are_answered_while_a_session_is_begun(tmp_path):
    """What came meanwhile stopped all reading, and the socket of a slow text encoder was closed."""
    engine = FakeEngine(encode_seconds=1.0)
    with served(fake_app(tmp_path, engine), ping=0.2) as port, opened(port) as socket:
        say(socket, "session.start", prompt="fox")
        say(socket, "session.pause")  # waits for the start
        until(socket, "session.started")
        until(socket, "session.paused")


def test_large_message_is_told(tmp_path):
    with served(fake_app(tmp_path)) as port, opened(port) as socket:
        socket.send('{"type": "session.start", "prompt": "' + "x" * 100_000 + '"}')
        assert until(socket, "error")["code"] == "too_large"
        say(socket, "session.start", prompt="x" * 2001)
        assert until(socket, "error")["code"] == "prompt_too_long"
        say(socket, "session.start", prompt="fox")
        until(socket, "session.started")


def test_end_of_the_server_keeps_the_video(tmp_path):
    with served(fake_app(tmp_path)) as port, opened(port) as socket:
        say(socket, "session.start", prompt="fox")
        until(socket, "thumbnail")
    with pytest.raises(ConnectionClosed):
        until(socket, "nothing")
    kinds = sorted(path.suffix for path in (tmp_path / "videos").iterdir())
    assert kinds == [".json", ".mp4"]


def usage() -> tuple[int, int]:
    """(threads, open files) of this process."""
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    """Bytes of memory of this process, without what waits to be collected or given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def kill_sessions(port: int, count: int) -> None:
    """Sessions whose clients vanish in the middle of a block."""
    for number in range(count):
        raw = socket.create_connection(("127.0.0.1", port))
        raw.sendall(handshake(port))
        raw.recv(1000)
        raw.sendall(masked({"type": "session.start", "prompt": f"fox {number}"}))
        raw.recv(100)
        raw.close()
    lasts(lambda: health(port)["sessions"] == 0, 20)


@pytest.mark.slow
def test_fifty_killed_sessions_leave_nothing(tmp_path):
    options = {"idle_seconds": 0.01, "max_sessions": 60, "sessions_per_address": 60}
    with served(fake_app(tmp_path, **options)) as port:
        kill_sessions(port, 50)
        before, memory = usage(), resident()
        kill_sessions(port, 50)
        lasts(lambda: usage() <= before)
        assert resident() - memory < 8 * 2**20
    assert not any(path.name.endswith(".live.mp4") for path in (tmp_path / "videos").iterdir())
