"""The server from outside, in this process: what a page, curl and strangers get."""

import io
import json
import re
import time
from collections import deque

import av
import pytest
import torch
from starlette.datastructures import Headers
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from server.access import Access, host_name, is_loopback
from server.connection import WAITING, Connection, Rate
from server.protocol import Limits
from tests.server.fakes import BLOCK, FPS, SIZE, FakeEngine, fake_app
from tests.server.test_protocol import HOSTILE

PATH = "/v1/realtime/video"
TOKEN = "a-token-of-ours"


@pytest.fixture
def client(tmp_path):
    with TestClient(fake_app(tmp_path, lead=1.0)) as client:
        yield client


class Talk:
    """A socket that speaks the protocol and keeps what it is told."""

    def __init__(self, socket):
        self.socket, self.told, self.data = socket, [], []
        self.unread = deque()

    def say(self, kind, **fields):
        self.socket.send_text(json.dumps({"type": kind, **fields}))
        return self

    def receive(self):
        event = self.socket.receive()
        if event["type"] == "websocket.close":
            raise WebSocketDisconnect(event.get("code"))
        if event.get("bytes") is not None:
            self.data.append(event["bytes"])
        else:
            self.told.append(json.loads(event["text"]))
            self.unread.append(self.told[-1])

    def until(self, kind):
        """The next message of a type."""
        while True:
            while not self.unread:
                self.receive()
            if (message := self.unread.popleft())["type"] == kind:
                return message

    def play_until(self, kind):
        """The next message of a type, for a player that has always played all it was sent."""
        while all(message["type"] != kind for message in self.unread):
            self.say("playhead", seconds=1e6)
            self.receive()
        return self.until(kind)

    def frames(self, count):
        """Wait until so many frames were sent; all bytes of the video."""
        while sum(data.count(b"moof") for data in self.data) < count:
            self.receive()
        return b"".join(self.data)


def start(socket, **fields) -> Talk:
    talk = Talk(socket).say("session.start", **{"prompt": "fox", **fields})
    talk.id = talk.until("session.started")["id"]
    return talk


def decoded(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as file:
        return [frame.time for frame in file.decode(video=0)]


def times(first: int, end: int) -> list[float]:
    return [number / FPS for number in range(first, end)]


# --- a session -----------------------------------------------------------------------------------


def test_session(client):
    with client.websocket_connect(PATH) as socket:
        talk = start(socket, seed=7)
        assert re.fullmatch(r"[0-9a-f]{32}", talk.id)
        assert talk.told[-1]["seed"] == 7
        about = talk.until("video.start")
        assert about == {
            "type": "video.start",
            "width": SIZE[1],
            "height": SIZE[0],
            "fps": FPS,
            "codec": "avc1.42C00A",
            "first_frame": 0,
            "from_seconds": 0.0,
        }
        assert decoded(talk.frames(16)) == times(0, 16)
        assert talk.data[0][4:8] == b"ftyp"
        assert b"moof" not in talk.data[0]
        talk.say("session.prompt_update", id="u1", prompt="owl")
        talk.until("session.prompt_update.accepted")
        # The prompt may be encoded later than the next block is made, so the player goes on.
        assert talk.play_until("session.prompt_update.applied")["id"] == "u1"
        stats = talk.until("stats")
        assert stats["view"]["levels"] == 1
        assert stats["first_frame_ms"] > 0
        talk.say("session.stop")
        stopped = talk.until("session.stopped")
        assert stopped["reason"] == "stopped"
        video = client.get(f"/v1/sessions/{talk.id}/video.mp4")
        assert decoded(video.content) == times(0, stopped["frames"])
        assert video.headers["content-type"] == "video/mp4"
        part = client.get(f"/v1/sessions/{talk.id}/video.mp4", headers={"Range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")
        record = client.get(f"/v1/sessions/{talk.id}/video.json")
        assert record.json()["frames"] == stopped["frames"]
        assert f'"{talk.id}.json"' in record.headers["content-disposition"]


def test_video_while_it_is_made(client):
    with client.websocket_connect(PATH) as socket:
        talk = start(socket)
        talk.frames(16)
        for _ in range(2):
            video = client.get(f"/v1/sessions/{talk.id}/video.mp4").content
            assert decoded(video) == times(0, 16)
        talk.say("playhead", seconds=0.5)
        talk.frames(24)
        assert len(decoded(client.get(f"/v1/sessions/{talk.id}/video.mp4").content)) >= 24


def test_video_outlives_the_server(tmp_path):
    with TestClient(fake_app(tmp_path)) as client, client.websocket_connect(PATH) as socket:
        talk = start(socket)
        talk.frames(16)
    with TestClient(fake_app(tmp_path)) as client:
        video = client.get(f"/v1/sessions/{talk.id}/video.mp4").content
        assert len(decoded(video)) >= 16
        assert client.get(f"/v1/sessions/{talk.id}/video.json").json()["prompt"] == "fox"
        with client.websocket_connect(PATH) as socket:
            error = Talk(socket).say("session.attach", id=talk.id).until("error")
            assert error["code"] == "unknown_session"


@pytest.mark.parametrize("how", ["query", "message"])
def test_jpeg(client, how):
    path, fields = (PATH + "?format=jpeg", {}) if how == "query" else (PATH, {"format": "jpeg"})
    with client.websocket_connect(path) as socket:
        talk = start(socket, **fields)
        while len(talk.data) < 16:
            talk.receive()
        assert all(data[:2] == b"\xff\xd8" for data in talk.data)


def test_attach_goes_on_from_the_key_frame(client):
    """A page that is loaded again in mid-stream; the first socket is told who has it now."""
    with client.websocket_connect(PATH) as first, client.websocket_connect(PATH) as second:
        talk = start(first)
        talk.frames(16)
        again = Talk(second).say("session.attach", id=talk.id, from_seconds=0.6)
        about = again.until("video.start")
        assert (about["first_frame"], about["from_seconds"]) == (8, 0.5)
        talk.until("session.replaced")
        again.say("playhead", seconds=0.75)
        data = again.frames(16)
        assert decoded(data)[:16] == times(8, 24)
        talk.say("playhead", seconds=1)
        assert talk.until("error")["code"] == "no_session"
        talk.say("session.attach", id=talk.id)  # and back
        again.until("session.replaced")


def test_branch(client):
    with client.websocket_connect(PATH) as socket:
        talk = start(socket)
        talk.frames(16)
        talk.until("snapshot.available")
        talk.data.clear()
        talk.say("session.branch", snapshot=2, prompt="owl")
        new = talk.until("session.started")
        assert new["id"] != talk.id
        about = talk.until("video.start")
        assert about["first_frame"] == 2 * BLOCK
        talk.until("session.prompt_update.applied")
        assert decoded(talk.frames(4))[:4] == times(8, 12)
        whole = client.get(f"/v1/sessions/{new['id']}/video.mp4").content
        assert decoded(whole)[:12] == times(0, 12)
        talk.say("session.branch", snapshot=999)
        assert talk.until("error")["code"] == "unknown_snapshot"


def test_one_session_at_a_time_per_socket(client):
    with client.websocket_connect(PATH) as socket:
        talk = start(socket, seconds=0.25)
        assert talk.until("session.stopped")["reason"] == "ended"
        talk.say("session.start", prompt="owl")
        assert talk.until("session.started")["prompt"] == "owl"
        talk.say("session.start", prompt="cat")
        assert talk.until("error")["code"] == "already_started"


# --- strangers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server with one session that all strangers meet."""
    app = fake_app(
        tmp_path_factory.mktemp("app"),
        lead=1.0,
        limits=Limits(max_prompt=50),
        rate=Rate(1e6, 1e6),
        max_sessions=3,
        sessions_per_address=2,
    )
    with TestClient(app) as client, client.websocket_connect(PATH) as socket:
        yield client, start(socket)


def unharmed(running) -> None:
    """The session still answers, and the server, too."""
    client, talk = running
    assert client.get("/v1/health").json()["status"] == "ok"
    talk.say("session.pause").say("session.resume").until("session.resumed")


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:50])
def test_nonsense(running, text):
    _, talk = running
    talk.socket.send_text(text)
    assert talk.until("error")["code"] == HOSTILE[text]
    unharmed(running)


BAD_STATE = [
    ({"type": "playhead", "seconds": -1}, "bad_playhead"),
    ({"type": "session.start", "prompt": "owl"}, "already_started"),
    ({"type": "session.attach", "id": "0" * 32}, "unknown_session"),
    ({"type": "session.attach", "id": "../../etc/passwd"}, "unknown_session"),
    ({"type": "session.attach", "id": "..\\..\\x"}, "unknown_session"),
    ({"type": "session.attach", "id": "\u0000"}, "unknown_session"),
    ({"type": "session.branch", "snapshot": 10**9}, "unknown_snapshot"),
]


@pytest.mark.parametrize(("message", "code"), BAD_STATE)
def test_what_cannot_be_now(running, message, code):
    _, talk = running
    talk.socket.send_text(json.dumps(message))
    assert talk.until("error")["code"] == code
    unharmed(running)


@pytest.mark.parametrize(
    "kind",
    ["session.pause", "session.resume", "session.stop", "playhead", "hidden", "session.branch"],
)
def test_without_a_session(running, kind):
    client, _ = running
    with client.websocket_connect(PATH) as socket:
        fields = {"seconds": 1, "hidden": True, "snapshot": 1}
        assert Talk(socket).say(kind, **fields).until("error")["code"] == "no_session"
    unharmed(running)


def test_binary_message(running):
    _, talk = running
    talk.socket.send_bytes(b"\x00\xff")
    assert talk.until("error")["code"] == "bad_json"
    unharmed(running)


def test_broken_prompt(running):
    client, _ = running
    with client.websocket_connect(PATH) as socket:
        error = Talk(socket).say("session.start", prompt="no memory").until("error")
        assert (error["code"], "CUDA" in error["message"]) == ("start_failed", False)
    unharmed(running)


def test_too_many_sessions_of_one_address(running):
    client, _ = running
    with client.websocket_connect(PATH) as one, client.websocket_connect(PATH) as two:
        start(one)
        error = Talk(two).say("session.start", prompt="x").until("error")
        assert error["code"] == "too_many_sessions"
        Talk(one).say("session.stop").until("session.stopped")
    unharmed(running)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/sessions/../../etc/passwd/video.mp4",
        "/v1/sessions/%2e%2e%2f%2e%2e%2fetc%2fpasswd/video.mp4",
        "/v1/sessions/..%5c..%5cvideo/video.json",
        f"/v1/sessions/{'0' * 32}/video.mp4",
        f"/v1/sessions/{'0' * 32}/video.json",
        "/v1/sessions/" + "a" * 5000 + "/video.mp4",
        "/v1/sessions/%00/video.mp4",
        "/..%2f..%2fapp.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/static/../app.py",
        "/%00",
        "/v1/",
        "/v1/realtime/video",
    ],
)
def test_paths_lead_nowhere(running, path):
    client, _ = running
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    unharmed(running)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_other_methods(running, method):
    client, _ = running
    assert client.request(method, "/v1/health").status_code == 405
    unharmed(running)


def test_unknown_format(running):
    client, _ = running
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(PATH + "?format=exe"):
        pass
    unharmed(running)


def test_flood(tmp_path):
    """It is told once in a while, and at last the socket is closed; others go on."""
    app = fake_app(tmp_path, rate=Rate(10, 20))
    with TestClient(app) as client, client.websocket_connect(PATH) as socket:
        talk = start(socket)
        for _ in range(600):
            talk.say("playhead", seconds=0)
        with pytest.raises(WebSocketDisconnect) as closed:
            talk.until("nothing")
        codes = [m["code"] for m in talk.told if m["type"] == "error"]
        assert codes == ["too_many_messages"] * 5
        assert closed.value.code == 1008
        assert client.get("/v1/health").json()["sessions"] == 1
        with client.websocket_connect(PATH) as again:
            Talk(again).say("session.attach", id=talk.id).until("video.start")


def test_too_many_sockets(tmp_path):
    with TestClient(fake_app(tmp_path)) as client:
        sockets = [client.websocket_connect(PATH) for _ in range(16)]
        for socket in sockets:
            socket.__enter__()
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(PATH):
            pass
        for socket in sockets:
            socket.__exit__(None, None, None)
        with client.websocket_connect(PATH) as socket:
            start(socket)


# --- who may -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://testserver"}, 200),  # a proxy speaks TLS for us
        ({"Origin": "http://TESTSERVER"}, 200),
        ({"Host": "127.0.0.2"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1:9999", "Origin": "http://127.0.0.1:9999"}, 200),  # an SSH tunnel
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://testserver:81"}, 403),
        ({"Origin": "http://testserver.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://["}, 403),  # was an error of the server's own
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),  # rebound to this machine
        ({"Host": "testserver.evil.example"}, 403),
        ({"Host": "testserver@evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "["}, 403),
    ],
)
def test_host_and_origin(running, headers, status):
    client, _ = running
    for path in ("/", "/v1/config"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == status
        assert answer.headers["x-content-type-options"] == "nosniff"
    try:
        with client.websocket_connect(PATH, headers=headers):
            opened = True
    except WebSocketDisconnect:
        opened = False
    assert opened is (status == 200)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    app = fake_app(tmp_path_factory.mktemp("app"), access=Access(None, TOKEN, "token_7860"))
    with TestClient(app) as client:
        yield client


ROUTES = ["/", "/v1/health", "/v1/config", "/v1/sessions/x/video.mp4", "/index.html"]


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"params": {"token": "wrong"}},
        {"params": {"token": ""}},
        {"params": {"token": TOKEN + "x"}},
        {"params": {"token": "é"}},
        {"headers": {"Authorization": "Bearer wrong"}},
        {"headers": {"Authorization": TOKEN}},
        {"headers": {"Cookie": "token_7860=wrong"}},
        {"headers": {"Cookie": "other=" + TOKEN}},
        {"headers": {"Cookie": "\x7f;;=;token_7860"}},
    ],
)
def test_without_the_token(guarded, shown):
    for path in ROUTES:
        assert guarded.get(path, **shown).status_code == 403
    query = f"?token={shown['params']['token']}" if "params" in shown else ""
    with pytest.raises(WebSocketDisconnect):
        guarded.websocket_connect(PATH + query, headers=shown.get("headers", {})).__enter__()


def test_token(guarded):
    """In the address once; then it is a cookie that no script reads and no other site sends."""
    first = guarded.get("/", params={"token": TOKEN})
    cookie = first.headers["set-cookie"]
    assert first.status_code == 200
    assert cookie == f"token_7860={TOKEN}; HttpOnly; Path=/; SameSite=Strict"
    assert first.headers["referrer-policy"] == "no-referrer"
    assert guarded.get("/v1/config").status_code == 200  # by the cookie
    with guarded.websocket_connect(PATH) as socket:
        start(socket)
    guarded.cookies.clear()
    beside = f'a; {{"b": 1}}; path=/; c={{"d": "e"}}; token_7860={TOKEN}'  # other programs' cookies
    assert guarded.get("/v1/config", headers={"Cookie": beside}).status_code == 200
    assert guarded.get("/v1/config").status_code == 403
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.get("/v1/config", headers=bearer).status_code == 200
    with guarded.websocket_connect(f"{PATH}?token={TOKEN}"):
        pass


@pytest.mark.parametrize(
    ("name", "own"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("", False)]
    + [(name, False) for name in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example")],
)
def test_loopback(name, own):
    assert is_loopback(name) is own
    access = Access.of(name, 7860, None, ["demo.example"])
    assert access.hosts == (frozenset({"demo.example"}) if own else None)


def test_names_of_a_proxy_are_read_as_hosts_are():
    access = Access.of("127.0.0.1", 7860, None, ["Live.Example.org:443"])
    assert access.refusal(Headers({"host": "live.example.org"}), "") is None
    assert access.refusal(Headers({"host": "example.org"}), "") is not None


def test_host_names():
    assert host_name("[::1]:7860") == "::1"
    assert host_name("LOCALHOST:1") == "localhost"
    assert host_name("localhost:99999x") == "localhost"


def test_page_and_config(tmp_path):
    app = fake_app(tmp_path, about={"title": "T", "examples": ["a"]}, lead=1.25)
    with TestClient(app) as client:
        page = client.get("/")
        assert "<title>page" in page.text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "blob:" in policy
        config = client.get("/v1/config").json()
        assert config["title"] == "T"
        assert config["policies"] == ["keep", "recache", "renoise", "cut"]
        assert (config["width"], config["block_frames"], config["lead"]) == (SIZE[1], BLOCK, 1.25)


def test_out_of_memory_leaves_the_others(tmp_path):
    failures = {"bad": deque([torch.OutOfMemoryError("CUDA out of memory")])}
    app = fake_app(tmp_path, FakeEngine(failures=failures))
    with (
        TestClient(app) as client,
        client.websocket_connect(PATH) as one,
        client.websocket_connect(PATH) as two,
    ):
        good, bad = start(one, prompt="good"), start(two, prompt="bad")
        assert "too little memory" in bad.until("error")["message"]
        assert bad.until("session.stopped")["reason"] == "out_of_memory"
        good.frames(16)
        start(two, prompt="bad").frames(16)


@pytest.mark.slow
def test_video_is_sent_as_it_is_played(tmp_path):
    """Whoever came back to the beginning of a long video got all of it at once."""
    app = fake_app(tmp_path, lead=100.0)
    with TestClient(app) as client, client.websocket_connect(PATH) as socket:
        talk = start(socket, seconds=50)
        talk.frames(30 * FPS)
        while client.get(f"/v1/sessions/{talk.id}/video.json").json()["frames"] < 50 * FPS:
            time.sleep(0.01)
        talk.say("nothing").until("error")
        assert sum(data.count(b"moof") for data in talk.data) == 30 * FPS
        talk.say("playhead", seconds=0.5)
        talk.frames(30 * FPS + 8)
        talk.say("playhead", seconds=25)
        assert len(decoded(talk.frames(50 * FPS))) == 50 * FPS


def test_client_that_reads_no_messages():
    """What is told to it waits in a row of bounded length; then it is let go, and can come back."""
    quiet = {"limits": Limits(), "rate": Rate(), "format": "mp4", "address": ""}
    connection = Connection(None, None, **quiet)
    for number in range(WAITING + 5):
        connection.tell({"type": "stats", "number": number})
    assert connection._lost
    assert len(connection._row) == WAITING
