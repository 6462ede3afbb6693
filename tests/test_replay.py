"""Prompt schedules and replays on the command line: the same frames, and nothing else opened."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import main
from pipeline import load_pipeline
from pipeline.records import chained_hash
from pipeline.replay import read_replay
from pipeline.session import Session
from tests.conftest import TinyWorld
from utils.errors import UserError
from utils.video import probe_video, read_video

# x264 does not give the same bytes each time for small pictures: below 64 often, at 64 rarely.
SIZE = ["height=128", "width=128"]
SCHEDULE = "0s: a red ball\n1s: [recache] a blue ball\n2s: [cut] a green ball\n3s: red [blend 2]\n"


@pytest.fixture(scope="module")
def made(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video with changes of prompt, and its record."""
    folder = tmp_path_factory.mktemp("made")
    schedule = folder / "schedule.yaml"
    schedule.write_text(SCHEDULE, encoding="utf-8")
    flags = [
        "--config_path",
        str(tiny_world.config),
        "--checkpoint_path",
        str(tiny_world.checkpoint),
    ]
    flags += ["--prompt_schedule", str(schedule), "--duration", "4", "--seed", "5"]
    assert main([*flags, "--output_folder", str(folder), *SIZE]) == 0
    return folder / "a red ball-0.mp4"


def replay_flags(world: TinyWorld, record: Path, folder: Path) -> list[str]:
    root = world.folder.parent
    return [
        *("--replay", str(record), "--checkpoint_path", str(world.checkpoint)),
        *("--output_folder", str(folder), f"model_root={root}"),
    ]


@pytest.mark.slow
def test_a_schedule_is_what_the_same_changes_are_live(tiny_world: TinyWorld, made: Path) -> None:
    """Block for block; the shorter first blocks of scenes are made up for at the end."""
    assert probe_video(made).frames == 64
    record = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
    changes = [(c["block"], c["policy"], c["blend_blocks"]) for c in record["changes"]]
    assert changes == [(2, "recache", 0), (3, "cut", 0), (5, "keep", 2)]
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", SIZE)
    frames = []
    with pipe.stream("a red ball", seed=5, num_latent_frames=record["latent_frames"]) as stream:
        for change in [*record["changes"], {"block": 99}]:
            while stream.next_index < change["block"]:
                block = stream.next_block()
                if block is None:
                    break
                frames.append(block)
            if "prompt" in change:
                stream.set_prompt(change["prompt"], change["policy"], change["blend_blocks"])
    assert chained_hash("", torch.cat(frames)[:64]) == record["frames_hash"]


@pytest.mark.slow
def test_replay_makes_the_same_video(
    tiny_world: TinyWorld, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(replay_flags(tiny_world, made.with_suffix(".json"), tmp_path)) == 0
    assert "the same, frame for frame" in capsys.readouterr().out
    assert torch.equal(read_video(tmp_path / made.name), read_video(made))


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [[], ["sink_ema=0.5", "clean_pass_sees_sink=false"]])
def test_a_session_and_its_branch_are_replayed(
    tiny_world: TinyWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    averaged: list[str],
) -> None:
    """A session has a larger cache: its averaged sink took frames in at other moments."""
    alone = ["merge_clean_pass=false"]  # a record says it, though the frames are hardly others
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", alone + averaged)
    session = Session.start(pipe, "a red ball", seed=3)
    for _ in range(9):
        session.step()
    session.set_prompt("a blue ball", "renoise")
    session.step()
    branch = session.branch(session.branch_points[-1], "a green ball", seed=9)
    for _ in range(3):
        branch.step()
    for name, each in (("session", session), ("branch", branch)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(each.record()), encoding="utf-8")
        assert read_replay(path).read_config(name).merge_clean_pass is False
        assert main(replay_flags(tiny_world, path, tmp_path / "out")) == 0
        assert "the same, frame for frame" in capsys.readouterr().out


def test_changes_that_no_video_of_the_model_can_make_are_refused_before_it_is_loaded(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video was made up to there, and thrown away."""
    monkeypatch.setattr("pipeline.batch.load_checked", None)
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("9s: [cut] a green ball\n", encoding="utf-8")
    flags = ["--config_path", str(tiny_world.config), "--checkpoint_path"]
    flags += [str(tiny_world.checkpoint), "--prompt", "a ball", "--prompt_schedule", str(schedule)]
    flags += ["--output_folder", str(tmp_path), "independent_first_frame=true"]
    with pytest.raises(UserError, match="use renoise instead of cut"):
        main(flags)


def changed(made: Path, tmp_path: Path, **values: Any) -> Path:
    """The record with other values; `config__x` is key x of its config."""
    record = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
    for name, value in values.items():
        place, group = record, name.split("__")
        for key in group[:-1]:
            place = place[key]
        place[group[-1]] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"prompt": None}, "'prompt' must be a str"),
        ({"frames": -1}, "'frames' must be a whole number"),
        ({"frames": True}, "'frames' must be a whole number"),
        ({"latent_frames": 1e9}, "'latent_frames' must be a whole number"),
        ({"settings": []}, "'settings' must be a dict"),
        ({"settings__seed": "1"}, "'seed' must be a whole number"),
        ({"changes": {}}, "'changes' must be a list"),
        ({"changes": [3]}, "change 0 must hold"),
        ({"changes": [{"block": 1, "run": "x"}]}, "change 0 must hold"),
        ({"changes": [{"block": -1, "prompt": "a"}]}, "'block' must be a whole number"),
        ({"changes": [{"block": 1, "policy": "os"}]}, "has the policy 'os'"),
        ({"changes": [{"block": 4, "seed": 1}, {"block": 2, "seed": 1}]}, "not in the order"),
        ({"config": {"generator_name": "Tiny", "data_path": "x:y"}}, "does not decide a video"),
        ({"config__generator_name": "../../etc"}, "without a path"),
        ({"config__generator_name": "/etc"}, "without a path"),
        ({"config__height": "tall"}, "height"),
        ({"config__height": -32}, "height"),
        ({"config__model_kwargs": {"run": 1}}, "unknown key"),
        ({"config__negative_prompt": "${oc.env:HOME}"}, "which nothing here replaces"),
        ({"checkpoint": "/etc/passwd"}, "without a path"),
        ({"checkpoint": "../x.pt"}, "without a path"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_records_are_data_and_checked(
    made: Path, tmp_path: Path, values: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        read_replay(changed(made, tmp_path, **values))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"settings__checkpoint_hash": "0"}, "another generator: these weights"),
        ({"settings__vae_hash": "0", "settings__network": "x"}, "network .* and another VAE"),
        ({"settings__image": "0"}, "give it with --image"),
    ],
)
def test_other_weights_and_prefixes_are_refused(
    tiny_world: TinyWorld, made: Path, tmp_path: Path, values: dict[str, Any], word: str
) -> None:
    path = changed(made, tmp_path, **values)
    with pytest.raises(UserError, match=word):
        main(replay_flags(tiny_world, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_machine_is_told(
    tiny_world: TinyWorld, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(made, tmp_path, device="NVIDIA H200", frames_hash="0")
    main(replay_flags(tiny_world, path, tmp_path / "out"))
    assert "the recorded one on NVIDIA H200 in float32" in capsys.readouterr().out


def test_a_replay_takes_all_from_the_record(
    tiny_world: TinyWorld, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made.with_suffix(".json")
    flags = replay_flags(tiny_world, record, tmp_path / "out")
    with pytest.raises(UserError, match="leave --seed out"):
        main([*flags, "--seed", "3"])
    with pytest.raises(UserError, match="a replay cannot change it"):
        main([*flags, "height=64"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"distilled\.pt, which is not in checkpoints/"):
        main(["--replay", str(record), f"model_root={tiny_world.folder.parent}"])
    Path("checkpoints").mkdir()
    shutil.copy(tiny_world.checkpoint, "checkpoints")
    assert read_replay(record).find_checkpoint(None) == "checkpoints/distilled.pt"
