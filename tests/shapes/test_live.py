"""The live server with the model that ships: what it makes can be made again; nothing is left."""

import json
import time
from pathlib import Path

import pytest

import inference
from pipeline import load_pipeline
from server.engine import PipelineEngine
from shapes import demo
from tests.server.fakes import fake_app, served
from tests.server.test_network import health, kill_sessions, opened, resident, say, until, usage
from utils.cli import run_main
from utils.config import ROOT

PROMPTS = {
    word: f"A large {word} circle drifts slowly to the right over a gray background."
    for word in ("red", "green", "blue")
}


@pytest.fixture(scope="module")
def engine() -> PipelineEngine:
    return PipelineEngine(
        load_pipeline(ROOT / demo.CONFIG, ROOT / demo.LIVE_CHECKPOINT, use_ema=True)
    )


@pytest.mark.slow
def test_record_makes_the_same_video(engine, tmp_path, monkeypatch, capsys):
    """A session that was directed, branched and watched equals its replay, frame for frame."""
    with served(fake_app(tmp_path, engine, lead=4.0)) as port, opened(port) as socket:
        say(socket, "session.start", prompt=PROMPTS["red"], seed=5)
        until(socket, "snapshot.available")
        say(socket, "session.prompt_update", id="1", prompt=PROMPTS["green"], policy="recache")
        until(socket, "session.prompt_update.applied")
        snapshot = until(socket, "snapshot.available")["id"]
        say(socket, "session.branch", snapshot=snapshot, prompt=PROMPTS["blue"], policy="cut")
        name = until(socket, "session.started")["id"]
        until(socket, "session.prompt_update.applied")
        until(socket, "thumbnail")
        say(socket, "session.stop")
        frames = until(socket, "session.stopped")["frames"]
    record = tmp_path / "videos" / f"{name}.json"
    made = json.loads(record.read_text())
    assert made["frames"] == frames
    monkeypatch.chdir(ROOT)
    assert (
        run_main(inference.main, ["--replay", str(record), "--output_folder", str(tmp_path)]) == 0
    )
    (again,) = [path for path in tmp_path.glob("*.json") if path != record]
    assert json.loads(again.read_text())["frames_hash"] == made["frames_hash"]


@pytest.mark.long
def test_fifty_killed_sessions_leave_nothing(engine, tmp_path):
    options = {"idle_seconds": 0.01, "max_sessions": 60, "sessions_per_address": 60}
    with served(fake_app(tmp_path, engine, **options)) as port:
        kill_sessions(port, 50)
        before, memory = usage(), resident()
        for _ in range(3):
            kill_sessions(port, 50)
            time.sleep(1)
        assert usage() <= before
        assert resident() - memory < 64 * 2**20
        assert health(port)["sessions"] == 0
    assert not list(Path(tmp_path / "videos").glob("*.live.mp4"))
