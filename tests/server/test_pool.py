"""Sessions together: turns, places, changes, failures, idleness; with a fake model and clock."""

import asyncio
import functools
import threading
import time
from collections import deque
from contextlib import asynccontextmanager

import pytest
import torch

from server.live import LiveSession
from server.pool import PoolOptions, SessionPool
from server.protocol import Branch, ProtocolError, Start, Update
from server.storage import Storage
from tests.server.fakes import BLOCK, FPS, FakeClient, FakeClock, FakeEngine, colour
from utils.errors import UserError

BLOCK_SECONDS = BLOCK / FPS


def in_loop(test):
    """Run a coroutine test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


@asynccontextmanager
async def pool_of(tmp_path, engine: FakeEngine | None = None, disk: int = 10**8, **options):
    storage = Storage(tmp_path / "videos", disk)
    options = {"lead": 1.0, **options}
    clock = FakeClock()
    pool = SessionPool(engine or FakeEngine(), storage, PoolOptions(**options), clock=clock)
    async with pool:
        yield pool


async def begin(pool: SessionPool, prompt: str = "fox", **asked) -> tuple[LiveSession, FakeClient]:
    """A session that plays, and its client."""
    live = await started(pool, prompt, **asked)
    return live, watch(pool, live)


async def started(pool: SessionPool, prompt: str = "fox", **asked) -> LiveSession:
    """A session that nobody watches yet."""
    values = {"seed": None, "seconds": None, "format": None, "policy": "keep", **asked}
    address = values.pop("address", "1.1.1.1")
    return await pool.start(Start(prompt, **values), address)


def watch(pool: SessionPool, live: LiveSession) -> FakeClient:
    """Its first client."""
    client = FakeClient()
    live.attach(client, 0, again=False)
    pool.wake()
    return client


async def settled(pool: SessionPool) -> None:
    """Until nobody has anything to do at this time of the clock, no prompt is being encoded, and
    whoever is over is gone, with its files in place.
    """
    while True:
        await asyncio.sleep(0.005)
        lives = list(pool._live.values())
        if not pool._closing and not any(busy(live) for live in lives):
            return


def busy(live: LiveSession) -> bool:
    return bool(live.in_turn or live.undelivered or live.wants_turn() or live._encoding)


def play(pool: SessionPool, live: LiveSession, seconds: float) -> None:
    """The client says where it is."""
    live.hear(seconds)
    pool.wake()


def update(id: str = "u", prompt: str | None = "owl", **asked) -> Update:
    return Update(id, prompt, **{"seed": None, "policy": None, "blend_blocks": 0, **asked})


@in_loop
async def test_lead_is_kept(tmp_path):
    """A model ran away from its viewer: a change was on the screen only when all was played."""
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        assert live.made_seconds == 1.0
        for played in (0.1, 0.25, 0.5, 2.0):
            play(pool, live, played)
            await settled(pool)
            assert live.playback.played == min(played, 1.5)
            assert 0.75 <= live.made_seconds - live.playback.played <= 1.0
        assert client.heard("stats")[-1]["lead"] == 1.0
        with pytest.raises(ProtocolError, match="went back"):
            live.hear(0.1)


@in_loop
async def test_slow_reader_gets_no_further(tmp_path):
    """It says that it has played what it was never sent."""
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        client.slow = True
        for _ in range(5):
            play(pool, live, 1e9)
            await settled(pool)
        assert live.made_seconds == 1.0


@pytest.mark.parametrize("how", ["silent", "hidden", "paused"])
@in_loop
async def test_nobody_watches(tmp_path, how):
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        client.slow, live.playback.played = False, 1.0  # all was played
        if how == "silent":
            pool.clock.now += 6
        elif how == "hidden":
            live.hide(True)
        else:
            live.pause()
        pool.wake()
        await settled(pool)
        assert live.made_seconds == 1.0
        assert live.stats()["state"] == ("paused" if how == "paused" else "waiting")
        if how == "hidden":
            live.hide(False)
        if how == "paused":
            live.resume()
            assert [m["type"] for m in client.told if m["type"].startswith("session.")] == [
                "session.started",
                "session.paused",
                "session.resumed",
            ]
        play(pool, live, 1.0)
        await settled(pool)
        assert live.made_seconds == 2.0
        assert live.stats()["state"] == "playing"


@in_loop
async def test_turns_are_fair(tmp_path):
    """Whoever came first took every turn that it could get."""
    engine = FakeEngine(step_seconds=0.001)
    async with pool_of(tmp_path, engine, lead=10.0) as pool:
        lives = [await started(pool, name) for name in ("a", "b", "c")]
        for live in lives:
            watch(pool, live)
        await settled(pool)
        early = engine.steps[6:60]
        assert all(abs(early.count(name) - 18) <= 3 for name in "abc")
        assert [live.made_seconds for live in lives] == [10.0] * 3


@in_loop
async def test_bounded_video_ends(tmp_path):
    async with pool_of(tmp_path, lead=9.0) as pool:
        live, client = await begin(pool, seconds=1.0)
        await settled(pool)
        assert client.told[-1] == {
            "type": "session.stopped",
            "reason": "ended",
            "frames": 16,
            "replay": f"python inference.py --replay {live.name}.json",
        }
        assert [m["seconds"] for m in client.heard("thumbnail")] == [0.0]
        with pytest.raises(ProtocolError, match="was stopped"):
            live.pause()


@in_loop
async def test_stop_comes_after_the_block_that_is_made(tmp_path):
    engine = FakeEngine(step_seconds=0.05)
    async with pool_of(tmp_path, engine) as pool:
        live, client = await begin(pool)
        await asyncio.sleep(0.02)
        live.stop("stopped")
        await settled(pool)
        assert client.told[-1]["type"] == "session.stopped"
        assert client.told[-1]["frames"] == live.recording.frames == BLOCK


# --- changes -------------------------------------------------------------------------------------


@in_loop
async def test_change_is_applied(tmp_path):
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        pool.update(live, update(policy="recache"))
        await settled(pool)
        assert client.heard("session.prompt_update.accepted") == [
            {"type": "session.prompt_update.accepted", "id": "u"}
        ]
        assert client.heard("session.prompt_update.applied") == []
        play(pool, live, 0.3)
        await settled(pool)
        assert client.heard("session.prompt_update.applied") == [
            {
                "type": "session.prompt_update.applied",
                "id": "u",
                "block": 4,
                "frame": 16,
                "seconds": 1.0,
                "whole_from_block": 6,
                "whole_from_frame": 24,
                "whole_from_seconds": 1.5,
                "prompt": "owl",
                "seed": None,
                "policy": "recache",
            }
        ]


@in_loop
async def test_changes_keep_their_order(tmp_path):
    """A change of seed has no text to encode and came before the prompt that was sent first."""
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        pool.update(live, update("1", "owl"))
        pool.update(live, update("2", None, seed=7))
        pool.update(live, update("3", "cat"))
        await settled(pool)
        play(pool, live, 0.3)
        await settled(pool)
        ids = [m["id"] for m in client.heard("session.prompt_update.superseded")]
        assert ids == ["1", "2"]
        assert [m["id"] for m in client.heard("session.prompt_update.applied")] == ["3"]


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ("refuse", "refused", "this model cannot do that"),
        ("no text", "refused", "(RuntimeError); the server's log"),
    ],
)
@in_loop
async def test_refused_change(tmp_path, prompt, code, words):
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        pool.update(live, update("x", prompt))
        await settled(pool)
        play(pool, live, 0.3)
        await settled(pool)
        (error,) = client.heard("error")
        assert (error["code"], error["id"]) == (code, "x")
        assert words in error["message"]
        assert live.made_seconds > 1.0


@in_loop
async def test_changes_are_bounded(tmp_path):
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        for number in range(16):
            pool.update(live, update(str(number)))
        with pytest.raises(ProtocolError, match="16 changes wait"):
            pool.update(live, update("more"))
        live.stop("stopped")
        await settled(pool)
        assert live.stopped
        answered = {m["id"] for m in client.heard("error")}
        assert answered == {str(number) for number in range(16)}


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("block 0 has frames that are not numbers"), "not numbers"),
        (RuntimeError("secret path /root"), "this failed (RuntimeError)"),
    ],
)
@in_loop
async def test_failure_stays_in_its_session(tmp_path, error, words):
    """It is told, the session waits and can go on; the others notice nothing."""
    engine = FakeEngine(failures={"bad": deque([error])})
    async with pool_of(tmp_path, engine) as pool:
        (good, _), (bad, client) = await begin(pool, "good"), await begin(pool, "bad")
        await settled(pool)
        assert good.made_seconds == 1.0
        assert bad.made_seconds == 0.0
        (told,) = client.heard("error")
        assert told["code"] == "step_failed"
        assert words in told["message"]
        assert "secret" not in told["message"]
        assert client.heard("session.paused")
        bad.resume()
        pool.wake()
        await settled(pool)
        assert bad.made_seconds == 1.0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
@in_loop
async def test_a_session_ends_with_the_memory(tmp_path, error):
    """It waited with all that it held, and every other session failed in its turn."""
    engine = FakeEngine(failures={"bad": deque([error])})
    async with pool_of(tmp_path, engine) as pool:
        (good, _), (bad, client) = await begin(pool, "good"), await begin(pool, "bad")
        await settled(pool)
        (told,) = client.heard("error")
        assert "too little memory" in told["message"]
        assert "--profile 12gb" in told["message"]
        assert client.told[-1]["reason"] == "out_of_memory"
        assert [session.closed for session in engine.sessions] == [False, True]
        assert pool.find(bad.name) is None
        assert good.made_seconds == 1.0
        again, _ = await begin(pool, "bad")
        await settled(pool)
        assert again.made_seconds == 1.0


@in_loop
async def test_session_that_cannot_begin_leaves_nothing(tmp_path):
    async with pool_of(tmp_path) as pool:
        for prompt, words in (("no memory", "--profile 12gb"), ("no text", "RuntimeError")):
            with pytest.raises(ProtocolError, match=words):
                await begin(pool, prompt)
        assert pool.sessions == 0
        assert list(pool.storage.folder.iterdir()) == []
        assert pool.storage.used == 0


@in_loop
async def test_full_disk_ends_a_session(tmp_path):
    async with pool_of(tmp_path, disk=20_000, lead=1000.0) as pool:
        live, client = await begin(pool)
        await settled(pool)
        assert client.heard("error")[0]["code"] == "disk_full"
        assert client.told[-1]["reason"] == "disk_full"
        assert 0 < live.recording.frames < 300
        await pool.close(live, "idle")
        assert pool.storage.finished(live.name, ".mp4")
        assert pool.storage.used < 20_000


@in_loop
async def test_nothing_is_recorded_after_a_block_that_was_not(tmp_path, monkeypatch):
    """The next block was, so that the video had a hole, and its replay another length."""
    async with pool_of(tmp_path) as pool:
        live = await started(pool)
        add, calls = live.recording.add, []

        def add_or_fail(frames, told):
            calls.append(len(frames))
            if len(calls) == 2:
                while len(pool.engine.steps) < 3:
                    time.sleep(0.005)
                raise UserError("no space left on device")
            add(frames, told)

        monkeypatch.setattr(live.recording, "add", add_or_fail)
        client = watch(pool, live)
        await settled(pool)
        assert len(calls) == 2
        assert live.recording.frames == BLOCK
        assert client.told[-1]["type"] == "session.stopped"
        assert client.told[-1]["reason"] == "disk_full"
        assert [m["code"] for m in client.heard("error")] == ["disk_full"]


# --- places --------------------------------------------------------------------------------------


@in_loop
async def test_a_session_that_cannot_go_on_ends(tmp_path):
    """It kept its place, and every try to go on failed."""
    engine = FakeEngine(failures={"bad": deque([RuntimeError("no")])})
    async with pool_of(tmp_path, engine) as pool:
        live, client = await begin(pool, "bad")
        engine.sessions[0].can_go_on = False
        await settled(pool)
        assert client.told[-1]["reason"] == "step_failed"
        assert engine.sessions[0].closed
        assert pool.find(live.name) is None
        assert live.points == {}


@in_loop
async def test_places(tmp_path):
    async with pool_of(tmp_path, max_sessions=2) as pool:
        first, _ = await begin(pool, address="a")
        await begin(pool, address="b")
        with pytest.raises(ProtocolError, match="all 2 places are taken"):
            await begin(pool, address="c")
        first.stop("stopped")
        await settled(pool)
        await begin(pool, address="c")  # what is over gives way
        assert pool.find(first.name) is None
        await settled(pool)
        assert pool.storage.finished(first.name, ".mp4")


@in_loop
async def test_place_of_a_session_that_is_about_to_end(tmp_path):
    """Stop, then another video: with one place that was refused while a step was under way."""
    async with pool_of(tmp_path, FakeEngine(step_seconds=0.2), max_sessions=1) as pool:
        first, _ = await begin(pool)
        await asyncio.sleep(0.05)
        first.stop("stopped")
        assert not first.stopped
        await begin(pool)
        assert pool.find(first.name) is None
        while not pool.storage.finished(first.name, ".mp4"):
            await asyncio.sleep(0.01)


@in_loop
async def test_whoever_is_told_how_they_stand_waits_for_no_closing(tmp_path, monkeypatch):
    """A page that hears nothing takes its socket for dead; a long mp4 was written meanwhile."""
    written = threading.Event()
    monkeypatch.setattr("server.pool.HOUSEKEEPING", 0.02)
    async with pool_of(tmp_path, idle_seconds=60) as pool:
        old, gone = await begin(pool)
        _, client = await begin(pool)
        await settled(pool)
        save = old.recording.save
        monkeypatch.setattr(old.recording, "save", lambda: (written.wait(), save())[1])
        old.detach(gone)
        pool.clock.now += 61
        while pool.find(old.name):
            await asyncio.sleep(0.01)
        heard = len(client.heard("stats"))
        await asyncio.sleep(0.2)
        assert len(client.heard("stats")) > heard + 3
        assert pool.storage.finished(old.name, ".mp4") is None
        threading.Timer(0.2, written.set).start()
    assert pool.storage.finished(old.name, ".mp4")  # the end of the server waits for it


@in_loop
async def test_places_of_an_address(tmp_path):
    async with pool_of(tmp_path, max_sessions=9, sessions_per_address=2) as pool:
        await begin(pool, address="a")
        await begin(pool, address="a")
        with pytest.raises(ProtocolError, match="2 sessions are open from your address"):
            await begin(pool, address="a")
        await begin(pool, address="b")


@in_loop
async def test_many_starts_at_once_keep_to_the_places(tmp_path):
    """The place was counted only when the session was there."""
    async with pool_of(tmp_path, max_sessions=3) as pool:
        starts = [begin(pool, address=str(number)) for number in range(10)]
        done = await asyncio.gather(*starts, return_exceptions=True)
        assert sum(isinstance(result, tuple) for result in done) == pool.sessions == 3


@in_loop
async def test_idle_is_time_without_a_socket(tmp_path):
    async with pool_of(tmp_path, idle_seconds=60) as pool:
        live, client = await begin(pool)
        await settled(pool)
        pool.clock.now += 3600  # a paused tab for an hour
        await pool.keep_house()
        assert pool.find(live.name) is live
        live.detach(client)
        pool.clock.now += 59
        await pool.keep_house()
        assert pool.find(live.name) is live
        pool.clock.now += 1
        await pool.keep_house()
        assert pool.find(live.name) is None
        assert live.session.closed
        assert pool.storage.finished(live.name, ".mp4")


@in_loop
async def test_another_client_takes_over(tmp_path):
    """A page that is loaded again is told all that it needs to draw its timeline."""
    async with pool_of(tmp_path) as pool:
        live, old = await begin(pool)
        await settled(pool)
        pool.update(live, update())
        await settled(pool)
        play(pool, live, 0.3)
        await settled(pool)
        pool.update(live, update("waits"))
        new = FakeClient()
        live.attach(new, live.place(0.3), again=True)
        assert old.was_replaced
        live.detach(old)  # its socket closes later
        assert live.client is new
        kinds = [message["type"] for message in new.told]
        assert kinds[:2] == ["session.started", "session.prompt_update.applied"]
        assert new.heard("session.prompt_update.accepted") == [
            {"type": "session.prompt_update.accepted", "id": "waits"}
        ]
        assert kinds.count("snapshot.available") == 3
        assert kinds.index("thumbnail") < kinds.index("video.start")
        assert new.heard("video.start")[0]["first_frame"] == new.first_frame == 4
        assert live.playback.played == 0.25
        with pytest.raises(ProtocolError):
            live.hear(0.2)


@in_loop
async def test_reload_goes_on_where_it_was(tmp_path):
    async with pool_of(tmp_path) as pool:
        live, client = await begin(pool)
        await settled(pool)
        play(pool, live, 0.6)
        await settled(pool)
        live.detach(client)
        new = FakeClient()
        live.attach(new, live.place(None), again=True)
        assert new.first_frame == 8


# --- branches ------------------------------------------------------------------------------------


def shown(live: LiveSession) -> list[str]:
    """The colours of the frames of its mp4, by prompt."""
    from utils.video import read_video

    names = {name: torch.tensor(colour(name)) for name in ("fox", "owl")}
    means = read_video(live.recording.save()).double().mean((1, 2))
    return [min(names, key=lambda name: (names[name] - mean).abs().sum()) for mean in means]


@in_loop
async def test_branch(tmp_path):
    """Its mp4 is the whole video: the parent's frames up to the branch point, too."""
    async with pool_of(tmp_path) as pool:
        parent, client = await begin(pool)
        await settled(pool)
        snapshots = client.heard("snapshot.available")
        assert [(m["id"], m["seconds"]) for m in snapshots] == [
            (1, 0.25),
            (2, 0.5),
            (3, 0.75),
            (4, 1.0),
        ]
        assert client.heard("snapshot.dropped") == [{"type": "snapshot.dropped", "id": 1}]
        live = await pool.branch(parent, Branch(2, "owl", None, None), "1.1.1.1")
        new = FakeClient()
        live.attach(new, live.recording.frames, again=True)
        parent.detach(client)
        pool.wake()
        await settled(pool)
        assert new.heard("video.start")[0]["first_frame"] == 2 * BLOCK
        assert new.heard("session.started")[0]["prompt"] == "fox"
        applied = new.heard("session.prompt_update.applied")[0]
        assert (applied["id"], applied["prompt"], applied["frame"]) == (None, "owl", 8)
        assert shown(live)[: 4 * BLOCK] == ["fox"] * 8 + ["owl"] * 8
        assert shown(parent) == ["fox"] * 16
        with pytest.raises(ProtocolError, match="no snapshot 1 now"):
            await pool.branch(parent, Branch(1, None, None, None), "1.1.1.1")


@in_loop
async def test_branch_takes_its_parents_place_where_there_is_no_other(tmp_path):
    """With one place nobody could ever branch."""
    async with pool_of(tmp_path, max_sessions=1) as pool:
        parent, client = await begin(pool)
        await settled(pool)
        live = await pool.branch(parent, Branch(3, None, None, None), "1.1.1.1")
        parent.detach(client)
        live.attach(client, live.recording.frames, again=True)
        while pool.find(parent.name):
            await asyncio.sleep(0.01)
        assert pool.sessions == 1
        assert pool.storage.finished(parent.name, ".mp4")


@in_loop
async def test_parent_that_was_left_gives_way(tmp_path):
    async with pool_of(tmp_path, max_sessions=2) as pool:
        parent, client = await begin(pool)
        await settled(pool)
        await pool.branch(parent, Branch(3, None, None, None), "1.1.1.1")
        parent.detach(client)
        assert pool.sessions == 2
        await begin(pool, address="b")
        assert pool.find(parent.name) is None


# --- threads -------------------------------------------------------------------------------------


@in_loop
async def test_the_loop_is_free_during_a_step(tmp_path):
    engine = FakeEngine(step_seconds=0.5)
    async with pool_of(tmp_path, engine) as pool:
        await begin(pool)
        await asyncio.sleep(0.05)
        begin_at = asyncio.get_running_loop().time()
        await asyncio.sleep(0)
        pool.update(pool.find(next(iter(pool._live))), update())
        assert asyncio.get_running_loop().time() - begin_at < 0.1
        assert engine.steps == ["fox"]


@in_loop
async def test_close_during_a_step_keeps_its_block(tmp_path):
    engine = FakeEngine(step_seconds=0.1)
    async with pool_of(tmp_path, engine) as pool:
        live, _ = await begin(pool)
        await asyncio.sleep(0.03)
        await pool.close(live, "idle")
        assert live.session.closed
        assert pool.storage.finished(live.name, ".mp4")
        assert len(engine.steps) == 1


@in_loop
async def test_close_keeps_the_video_whatever_fails(tmp_path):
    """A record that could not be made left the session open, and its video was lost."""
    async with pool_of(tmp_path) as pool:
        live, _ = await begin(pool, "no record")
        await settled(pool)
        await pool.close(live, "idle")
        assert pool.storage.finished(live.name, ".mp4")
        assert pool.storage.finished(live.name, ".json") is None
        assert live.session.closed
