"""Videos that go on from true clips: the protocol, its table on true clips, and the command."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from evaluation.meters import Judge
from pipeline import VideoPipeline, load_pipeline
from shapes import drift
from shapes.drift import (
    SCENE_SEED,
    TEST_SEED,
    TRUTH,
    Other,
    Protocol,
    difference_lines,
    drift_rows,
    main,
    play,
    table,
)
from shapes.kept import ERRORS, PROPERTIES
from shapes.stored import BESIDE, POINTS, spans, sum_up
from shapes.world import render, sample_scene
from utils.cli import run_main
from utils.config import load_config


def test_a_length_is_told_over_the_seconds_of_that_clip():
    """Seconds that were given are the reference, and never counted."""
    found = dict(spans(101, 5.0, 0.0))
    assert tuple(found) == POINTS[: POINTS.index(20) + 1]
    assert found[1] == slice(1, 5)
    assert found[5] == slice(20, 25)
    assert found[20] == slice(95, 100)
    assert dict(spans(10, 5.0, 1.3)) == {1: slice(2, 5), 2: slice(5, 10)}
    assert dict(spans(2, 0.8, 0.0)) == {1: slice(1, 1), 2: slice(1, 2), 3: slice(2, 2)}


@pytest.fixture(scope="module")
def true_results():
    protocol = Protocol()
    results = []
    for number in range(4):
        scene = protocol.scene(number)
        judge = Judge(scene.caption, truth=TRUTH, given=9)
        judge.add(render(scene, 64))
        results.append({"prompt": scene.caption, "seed": 0, "report": judge.report(16)})
    return results


@pytest.mark.slow
def test_true_clips_keep_everything(true_results):
    """Lengths below a second tell nothing of the first one, which is the reference."""
    numbered = enumerate(true_results)
    videos = [sum_up(result, n, clip_seconds=0.8, given_seconds=9 / 16) for n, result in numbered]
    rows = drift_rows(videos)
    assert set(rows) == set(PROPERTIES)
    for name, row in rows.items():
        assert row["error"] == ERRORS[name]
        assert set(row) == {"error", "5x"}
        assert row["5x"]["low"] <= row["5x"]["drift"] <= row["5x"]["high"] < 4 * ERRORS[name], name
        assert row["5x"]["gain"] == pytest.approx(1, abs=0.02)
    lines = table(rows).splitlines()
    assert len(lines) == 1 + len(PROPERTIES)
    assert lines[0].split()[-1] == "5x"


def test_scenes_are_none_that_training_draws():
    seeds = (SCENE_SEED, TEST_SEED)
    ours = {Protocol(scene_seed=s).scene(n).shapes for s in seeds for n in range(16)}
    assert len(ours) == 32
    others = {sample_scene(0, n, split="heldout", unsaid=True).shapes for n in range(200)}
    assert not ours & others


def test_given_frames_are_those_of_the_videos_rate(tiny_world, monkeypatch):
    """Of a scene that moves on, so that at half the rate a frame shows twice as late a time."""
    given, real = [], VideoPipeline.encode_prefix

    def encoded(pipe, video):
        given.append(video)
        return real(pipe, video=video)

    monkeypatch.setattr(VideoPipeline, "encode_prefix", encoded)
    for fps in (16, 8):
        changes = ["width=32", "device=cpu", f"fps={fps}"]
        pipe = load_pipeline(load_config(tiny_world.config, changes))
        next(play(pipe, Protocol(times=1, clip=6), [0]))
    assert torch.equal(given[0][::2], given[1][: len(given[0][::2])])
    assert not torch.equal(given[0], given[1])


def run(tiny_world, out, *more):
    words = ["--config_path", tiny_world.config, "--checkpoint_path", tiny_world.checkpoint]
    words += [*more, "--clip", 6, "--times", 2, *(["--json", out] if out else [])]
    words += ["width=32", "device=cpu"]
    return run_main(main, [str(word) for word in words])


@pytest.mark.slow
@pytest.mark.parametrize("given", [1, 0], ids=["from true frames", "from noise"])
def test_the_command_measures_each_scene_once(tiny_world, tmp_path, monkeypatch, capsys, given):
    """In batches or alone, and on from where it was stopped, each gives the same figures."""
    out = tmp_path / "out.json"
    assert run(tiny_world, out, "--scenes", 2, "--given", given) == 0
    together = json.loads(out.read_text())
    assert together["settings"]["given"] == given
    assert [len(video["report"]["kept"]["tint"][0]["seconds"]) for video in together["videos"]] == [
        3,
        3,
    ]
    assert "tint (meter" in capsys.readouterr().out
    made = []
    whole = drift.continued
    monkeypatch.setattr(drift, "continued", lambda *a: (made.append(a[2]), whole(*a))[1])
    assert run(tiny_world, out, "--scenes", 3, "--given", given, "--batch", 1) == 0
    assert made == [[2]]
    assert json.loads(out.read_text())["videos"][:2] == together["videos"]
    alone = tmp_path / "alone.json"
    assert run(tiny_world, alone, "--scenes", 1, "--given", given, "--batch", 1) == 0
    (video,) = json.loads(alone.read_text())["videos"]
    assert video["prompt"] == together["videos"][0]["prompt"]


@pytest.mark.slow
def test_two_models_are_compared_scene_by_scene(true_results):
    """A tint that drifts by one more in every scene, and more right in one by chance."""
    videos = [sum_up(result, n, 0.8, 9 / 16) for n, result in enumerate(true_results)]
    others = deepcopy(videos)
    for video in others:
        video["kept"]["tint"]["drift"] = [drift + 1 for drift in video["kept"]["tint"]["drift"]]
    others[0]["curves"]["right"] = [0.0 for _ in others[0]["curves"]["right"]]
    found = Other(Path(), {}, others).differences(videos)
    assert found.keys() == {5}
    assert found[5].keys() == {*PROPERTIES, *BESIDE}
    assert [float(x) for x in found[5]["tint"][:3]] == pytest.approx([-1, -1, -1])
    assert found[5]["right"].mean == pytest.approx(0.25)
    lines = {line.split()[0]: line for line in difference_lines(found).splitlines()}
    assert lines["difference"].split()[-1] == "5x"
    assert lines["tint"].endswith("-1.000 [-1.000, -1.000] *")
    assert "+0.250 [" in lines["right"]
    assert not lines["right"].endswith("*")


@pytest.mark.slow
def test_the_other_model_is_one_of_the_same_scenes(tiny_world, tmp_path, capsys):
    out, other = tmp_path / "out.json", tmp_path / "other.json"
    assert run(tiny_world, out, "--scenes", 1) == 0
    assert run(tiny_world, out, "--scenes", 1, "--against", out) == 0
    assert f"minus {out}" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["against"]["path"] == str(out)
    assert content["against"]["differences"] == {}, "too short to reach the first length"
    for name in ("scene_seed", "given_seconds"):
        changed = {**content["settings"], name: content["settings"][name] + 1}
        other.write_text(json.dumps({**content, "settings": changed}))
        assert run(tiny_world, out, "--scenes", 1, "--against", other) == 2
        assert f"{name}=" in capsys.readouterr().err
    for text, said in (("{}", "holds no figures"), ("[", "holds no figures")):
        other.write_text(text)
        assert run(tiny_world, out, "--scenes", 1, "--against", other) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_rank_that_begins_later_makes_its_share(tiny_world, tmp_path, monkeypatch, capsys):
    """It took every second scene of those that the first one had left, and so none."""
    out = tmp_path / "out.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(tiny_world, out, "--scenes", 2, "--given", 0) == 0
    assert run(tiny_world, None, "--scenes", 2) == 2, "no rank would have all of it"
    said = capsys.readouterr()
    assert said.out.count("still being made") == 1
    assert "--json FILE" in said.err
    assert len(json.loads(out.read_text())["videos"]) == 2


@pytest.mark.slow
def test_a_batch_changes_no_video(tiny_world, tmp_path):
    """Each goes on from its own frames with its own noise."""
    reports = []
    for batch in (2, 1):
        out = tmp_path / f"{batch}.json"
        assert run(tiny_world, out, "--scenes", 2, "--batch", batch) == 0
        videos = json.loads(out.read_text())["videos"]
        reports.append([video["report"]["per_second"]["background_error"] for video in videos])
    assert reports[0][0] == pytest.approx(reports[1][0], abs=1)
    assert reports[0][1] == pytest.approx(reports[1][1], abs=1)
    assert reports[0][0] != pytest.approx(reports[0][1], abs=2), "so they could have been swapped"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--scenes", "0"], "must be at least 1"),
        (["--given", "-1"], "--given 0"),
        (["--given", "4"], "leaves nothing"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_made(tiny_world, tmp_path, wrong, said, capsys):
    assert run(tiny_world, tmp_path / "out.json", *wrong) == 2
    assert said in capsys.readouterr().err
