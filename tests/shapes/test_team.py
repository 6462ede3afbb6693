"""Several ranks make the videos of the shapes model: as commands, and on the live page."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import app
import inference
import server.listen
from shapes import demo
from tests.processes import free_port, store_of_ranks
from tests.server.test_app import PATH, start
from tests.tiny_training import finish
from tests.tiny_training import start as start_ranks
from utils.cli import run_main
from utils.config import ROOT

RED, BLUE = "A small red circle moves to the right.", "A large blue square moves to the left."


@pytest.mark.slow
def test_a_live_session_of_two_ranks_is_that_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its changes and a branch reach both, and both end with the server; one rank replays it."""
    monkeypatch.chdir(ROOT)
    team, names, port = 2, [], free_port()

    def visit(client: TestClient) -> None:
        host = {"host": client.base_url.netloc.decode()}
        with client.websocket_connect(PATH, headers=host) as socket:
            talk = start(socket, seed=3, prompt=RED)
            for policy in client.get("/v1/config").json()["policies"]:
                talk.say("session.prompt_update", id=policy, prompt=BLUE, policy=policy)
                applied = talk.play_until("session.prompt_update.applied")
                talk.frames(applied["frame"] + 9)
            snapshot = talk.until("snapshot.available")["id"]
            talk.say("session.branch", snapshot=snapshot, prompt=RED, policy="cut")
            branch = talk.until("session.started")["id"]
            talk.play_until("session.prompt_update.applied")
            talk.say("session.stop")
            talk.until("session.stopped")
            names.append(branch)

    def serve(page: Any, listener: Any, *, proxied: bool) -> None:
        with TestClient(page, base_url=f"http://127.0.0.1:{port}") as client:
            visit(client)

    monkeypatch.setattr(server.listen, "run", serve)
    flags = ["--output_dir", str(tmp_path), "--server_port", str(port), "--device", "cpu"]
    flags += [f"sequence_parallel={team}"]
    with monkeypatch.context() as patch, store_of_ranks() as address:
        for name, value in (address | {"WORLD_SIZE": str(team)}).items():
            patch.setenv(name, value)
        command = [sys.executable, "app.py", *flags]
        other = subprocess.Popen(command, env=os.environ | {"RANK": "1", "OMP_NUM_THREADS": "1"})
        try:
            patch.setenv("RANK", "0")
            assert run_main(app.main, flags) == 0
            assert other.wait(60) == 0
        finally:
            other.kill()
    record = tmp_path / f"{names[0]}.json"
    made = json.loads(record.read_text(encoding="utf-8"))
    assert {change["policy"] for change in made["changes"]} >= {"cut", "branch", "recache"}
    assert made["device"].startswith("2 x cpu")
    again = ["--replay", str(record), "--output_folder", str(tmp_path / "again")]
    assert run_main(inference.main, [*again, "--device", "cpu"]) == 0
    (replayed,) = (tmp_path / "again").glob("*.json")
    found = json.loads(replayed.read_text(encoding="utf-8"))
    assert found["frames_hash"] == made["frames_hash"]
    assert found["device"].startswith("cpu")


@pytest.mark.long
def test_two_teams_of_two_ranks_share_out_the_videos(tmp_path: Path) -> None:
    """`torchrun inference.py`: the files of one process, and one contact sheet."""
    flags = ["--config_path", demo.CONFIG, "--checkpoint_path", demo.CHECKPOINT, "--device", "cpu"]
    flags += ["--prompt", RED, "--prompt", BLUE, "--num_output_frames", "12"]
    made = {}
    for ranks, extra in ((None, []), (4, ["sequence_parallel=2"])):
        folder = tmp_path / str(ranks)
        sheet = ["--output_folder", str(folder), "--contact_sheet", str(folder / "sheet.png")]
        code, said = finish(start_ranks(["inference.py", *flags, *sheet, *extra], ranks))
        assert code == 0, said
        records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        made[ranks] = [record["frames_hash"] for record in records]
        assert (folder / "sheet.png").is_file()
    assert made[4] == made[None]
    assert len(made[4]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "ranks", "words"),
    [
        ("inference.py", 3, "needs 2 ranks for each video, and there are 3"),
        pytest.param(
            "inference.py",
            None,
            "needs 2 ranks for each video, and there are 1",
            marks=pytest.mark.long,
        ),
        ("app.py", None, "runs on 1 ranks, and sequence_parallel=2"),
    ],
)
def test_ranks_that_do_not_come_out_even(
    command: str, ranks: int | None, words: str, tmp_path: Path
) -> None:
    place = ["--output_dir" if command == "app.py" else "--output_folder", str(tmp_path / "out")]
    flags = [*place, "--device", "cpu", "sequence_parallel=2"]
    if command == "inference.py":
        flags += ["--prompt", RED]
    code, said = finish(start_ranks([command, *flags], ranks))
    assert code != 0
    assert words in said
    assert not (tmp_path / "out").exists()
