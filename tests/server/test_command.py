"""`python app.py`: its flags, the model that it opens, what it says, and a whole random model."""

import json
import signal
import socket
import time
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from starlette.testclient import TestClient

import app
import server.listen
from pipeline.session import Session
from server import models
from server.engine import PipelineEngine
from server.models import open_model, places, read_composer, warm_up
from tests.conftest import TinyWorld
from tests.processes import free_port
from tests.server.test_app import PATH, decoded, start
from utils.cli import run_main
from utils.config import load_config


@pytest.fixture
def served(monkeypatch, tmp_path):
    """`app.py`, but what it would serve is given to a test client."""

    port = free_port()

    def run(*flags: str, visit=lambda client: None) -> int:
        def serve(app, listener, *, proxied):
            with TestClient(app, base_url=f"http://127.0.0.1:{port}") as client:
                visit(client)

        monkeypatch.setattr(server.listen, "run", serve)
        place = ["--output_dir", str(tmp_path / "out"), "--server_port", str(port)]
        return run_main(app.main, [*place, *flags])

    return run


@pytest.mark.slow
def test_random_weights(served, capsys):
    """Nothing depends on one model: every policy, a branch, and the whole video at another size."""

    def visit(client):
        config = client.get("/v1/config").json()
        assert (config["width"], config["height"], config["model"]) == (96, 64, "random weights")
        assert config["composer"] is None
        host = {"host": client.base_url.netloc.decode()}
        with client.websocket_connect(PATH, headers=host) as socket:
            talk = start(socket, seed=3)
            end = 9
            for policy in config["policies"]:
                talk.say("session.prompt_update", id=policy, prompt=policy, policy=policy)
                applied = talk.play_until("session.prompt_update.applied")
                assert (applied["id"], applied["policy"]) == (policy, policy)
                assert applied["whole_from_frame"] >= applied["frame"] >= end - 9
                end = applied["frame"] + 9
                talk.frames(end)
            snapshot = talk.until("snapshot.available")["id"]
            talk.say("session.branch", snapshot=snapshot, prompt="another", policy="cut")
            branch = talk.until("session.started")
            assert talk.until("video.start")["first_frame"] == branch["frames"] > 0
            talk.play_until("session.prompt_update.applied")
            talk.say("session.stop")
            frames = talk.until("session.stopped")["frames"]
            video = client.get(f"/v1/sessions/{branch['id']}/video.mp4").content
            record = client.get(f"/v1/sessions/{branch['id']}/video.json").json()
            assert len(decoded(video)) == frames == record["frames"]
            assert json.dumps(record).count('"policy"') >= 5

    assert served("--random_weights", visit=visit) == 0
    said = capsys.readouterr().out
    assert "Open http://127.0.0.1:" in said
    assert "Only this machine reaches it" in said


@pytest.mark.parametrize(
    "flags",
    [["--server_name", "0.0.0.0"], ["--allowed_host", "live.example.org"]],
    ids=["a network", "a proxy in front"],
)
def test_token_beyond_this_machine(served, capsys, flags):
    def visit(client):
        assert client.get("/v1/health").status_code == 403

    assert served(*flags, "--random_weights", visit=visit) == 0
    said = capsys.readouterr().out
    assert "/?token=" in said
    assert "Whoever has this address may use it." in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server_port", "70000"], "--server_port 70000 must be"),
        (["--max_sessions", "0"], "--max_sessions 0 must be at least 1"),
        (["--lead", "nan"], "--lead nan must be above 0"),
        (["--idle_seconds", "-1"], "--idle_seconds"),
        (["--disk_limit", "inf"], "--disk_limit"),
        (["--token", "short"], "--token must be 8 to 128"),
        (["--token", "a token; x=ü"], "--token must be 8 to 128"),
        (["--config_path", "configs/none.yaml"], "configs/none.yaml"),
        (["--model", "no-model"], "there is no model 'no-model'"),
        (["--random_weights", "--server_name", "no.such.host.invalid"], "is no address"),
        (["--random_weights", "no_such_key=1"], "no_such_key"),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert run_main(app.main, ["--output_dir", "out", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_port_that_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
        flags = ["--random_weights", "--server_port", port, "--output_dir", str(tmp_path / "out")]
        assert run_main(app.main, flags) == 2
    assert "give another --server_port" in capsys.readouterr().err


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("lost", [True, False])
def test_a_server_ends_with_its_team(lost, ignored):
    """A rank that ended left a page on which nothing moved any more; for ever if the command was
    started in the background by a script, which ignores the signal.
    """
    team = SimpleNamespace(lost=False, when_lost=None)

    def run():
        with app.ended_with(team):
            team.lost = lost
            Thread(target=team.when_lost).start()
            time.sleep(10)

    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(app.UserError if lost else KeyboardInterrupt):
            run()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_servers_want_one_folder(served, tmp_path, capsys):
    def visit(client):
        flags = ["--random_weights", "--server_port", str(free_port())]
        assert run_main(app.main, [*flags, "--output_dir", str(tmp_path / "out")]) == 2
        assert "use another --output_dir" in capsys.readouterr().err

    assert served("--random_weights", visit=visit) == 0


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("has_ema", [True, False])
def test_ema_where_there_is_one(tiny_world: TinyWorld, tmp_path, use_ema, has_ema, caplog):
    """EMA is the published default, but a file of one network has none."""
    networks = torch.load(tiny_world.checkpoint, weights_only=True)
    if not has_ema:
        del networks["generator_ema"]
    torch.save(networks, tmp_path / "weights.pt")
    config = load_config(tiny_world.config, ["device=cpu"])
    pipe = open_model(config, str(tmp_path / "weights.pt"), use_ema=use_ema)
    expected = networks["generator_ema" if use_ema and has_ema else "generator"]
    name, value = next(iter(pipe.dit.state_dict().items()))
    assert torch.equal(value, expected[f"model.{name}"])
    assert ("has no generator_ema" in caplog.text) is (use_ema and not has_ema)


def test_engine_of_a_model_folder(tiny_world: TinyWorld):
    """Text encoder and VAE are in memory after the warm-up, so that no viewer waits for them."""
    pipe = open_model(load_config(tiny_world.config, ["device=cpu"]), None, use_ema=True)
    engine = PipelineEngine(pipe)
    session_bytes = warm_up(engine)
    session = Session.start(pipe, models.WARM_UP_PROMPT, seed=0)
    session.step()
    stream = session._stream
    cache, text = stream.rollout.cache, (*stream.rollout.text.keys, *stream.rollout.text.values)
    decoded = session_bytes - cache.num_bytes - sum(part.nbytes for part in text)
    assert decoded == sum(part.nbytes for part in stream._decoder.state_dict().values()) > 0
    assert pipe._text._encoder is not None
    assert (engine.size, engine.fps, engine.block_frames) == ((32, 48), 16, 12)
    assert read_composer(pipe.setup) is None


@pytest.mark.parametrize(("session", "step", "wanted"), [(10, 20, 5), (10, 0, 7), (99, 20, 1)])
def test_sessions_run_in_the_memory_that_a_step_leaves(monkeypatch, session, step, wanted):
    monkeypatch.setattr(models, "free_bytes", lambda device: 100)
    assert places(session, step, torch.device("cpu")) == wanted
    assert places(1, step, torch.device("cpu")) == 16


@pytest.mark.parametrize("text", ["{", "[]", '{"template": 1}'])
def test_broken_composer(tiny_world: TinyWorld, text):
    pipe = open_model(load_config(tiny_world.config, ["device=cpu"]), None, use_ema=True)
    path = tiny_world.folder / "composer.json"
    path.write_text(text, encoding="utf-8")
    try:
        with pytest.raises(app.UserError, match="fetch it again"):
            read_composer(pipe.setup)
    finally:
        path.unlink()


@pytest.mark.parametrize(("free", "place"), [(10**12, "auto"), (10_000, "cpu")])
def test_text_encoder_stays_where_there_is_room(tiny_world: TinyWorld, monkeypatch, free, place):
    """It would take half of a small GPU for good."""
    opened = []
    monkeypatch.setattr(models, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(models, "free_bytes", lambda device: free)
    monkeypatch.setattr(models, "load_generator", lambda setup, *_, **__: opened.append(setup))
    open_model(load_config(tiny_world.config), None, use_ema=True)
    assert [setup.machine.text_encoder_device for setup in opened] == [place]
