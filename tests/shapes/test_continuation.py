"""Continued clips: their distance from the truth, and the command."""

import json

import numpy as np
import pytest

from evaluation.statistics import to_json
from shapes import continuation
from shapes.continuation import SECONDS, distances, main, moments, travelled
from shapes.world import background_rows, render, sample_scene
from utils.cli import run_main

START, GIVEN = 64, 57
FRAMES = moments(GIVEN)[-1] + 1


@pytest.fixture(scope="module", params=[1, 2], ids=["one shape", "two shapes"])
def scene(request):
    """The first held-out scenes of so many shapes, which do not hide each other meanwhile."""
    scenes = (sample_scene(0, index, split="heldout") for index in range(200))
    for scene in scenes:
        paths = [shape.positions(FRAMES, start=START) for shape in scene.shapes]
        apart = np.hypot(*(paths[0] - paths[-1]).T).min()
        if len(scene.shapes) == request.param and (request.param == 1 or apart > 12):
            return scene
    raise AssertionError("no such scene")


def test_the_true_clip_is_where_it_should_be(scene):
    found = distances(render(scene, FRAMES, start=START), scene, START, GIVEN)
    assert found.shape == (len(scene.shapes), len(SECONDS))
    assert found.max() < 0.5


@pytest.mark.slow
def test_a_picture_that_stops_is_as_far_off_as_the_shapes_go(scene):
    video = render(scene, FRAMES, start=START)
    video[GIVEN:] = video[GIVEN - 1]
    far = travelled(scene, FRAMES, START, GIVEN)
    np.testing.assert_allclose(distances(video, scene, START, GIVEN), far, atol=0.5)
    speeds = [np.hypot(*shape.velocity) for shape in scene.shapes]
    assert (far <= np.outer(speeds, SECONDS) + 1e-3).all()
    assert far[:, 0].min() > 1, "a slow shape moves 2.5 units in a quarter second, if not around"


def test_shapes_that_vanish_have_no_distance(scene):
    video = render(scene, FRAMES, start=START)
    video[GIVEN + 20 :] = background_rows(scene.background, 64)[:, None]
    found = np.isfinite(distances(video, scene, START, GIVEN))
    assert found.tolist() == [[True, True, True, False, False]] * len(scene.shapes)


def test_the_command_measures_each_scene(tiny_world, tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--config_path", tiny_world.config, "--checkpoint_path", tiny_world.checkpoint]
    more = ["--scenes", 1, "--blocks", 2, "--json", out, "width=32", "device=cpu"]
    assert run_main(main, [str(a) for a in (*given, *more)]) == 0
    figures = json.loads(out.read_text())
    assert figures["seconds"] == list(SECONDS)
    assert all(len(figures[name]) == len(SECONDS) for name in ("distance", "still", "seen"))
    assert figures["overrides"] == ["width=32", "device=cpu"]
    assert figures["checkpoint_path"] == str(tiny_world.checkpoint)
    assert capsys.readouterr().out.startswith("seconds")


@pytest.mark.slow
def test_two_models_are_compared_shape_by_shape(tiny_world, tmp_path, monkeypatch, capsys):
    """A shape that one of them does not see is no pair; else losing the worse would be a gain."""
    given = ["--config_path", tiny_world.config, "--scenes", 2, "--blocks", 2]
    out, other = tmp_path / "out.json", tmp_path / "other.json"
    scenes = (sample_scene(0, index, split="heldout") for index in range(50))
    pair = next(scene for scene in scenes if len(scene.shapes) == 2)
    off = np.array([[2.0, 2.0, 2.0, 2.0, 2.0], [1.0, 8.0, np.nan, 1.0, 1.0]])
    monkeypatch.setattr(continuation, "sample_scene", lambda *_, **__: pair)
    monkeypatch.setattr(continuation, "distances", lambda *_: off)
    command = [str(word) for word in (*given, "--json", out, "width=32", "device=cpu")]
    assert run_main(main, command) == 0
    figures = json.loads(out.read_text())
    assert figures["off"] == [to_json(off)] * 2
    figures["off"] = [[[3, 2, 3, 1, None], [9, None, None, 3, None]]] * 2
    other.write_text(json.dumps(figures))
    assert run_main(main, [*command, "--against", str(other)]) == 0
    found = json.loads(out.read_text())["difference"]
    assert [each[0] for each in found] == [-4.5, 0, -1, -0.5, None]
    assert "-4.50 [" in capsys.readouterr().out
    for name, value, said in (("start", 5.0, "start=5.0, not 4.0"), ("off", [], "no figures")):
        other.write_text(json.dumps({**figures, name: value}))
        assert run_main(main, [*command, "--against", str(other)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--scenes", "0"], "--scenes and --blocks must be at least 1"),
        (["--start", "-1"], "--start at least 0"),
        (["--start", "inf"], "--start at least 0"),
        (["width=48"], "no square videos"),
        (["--json", __file__ + "/out.json"], "is a file where a folder should be"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(tiny_world, wrong, said, capsys):
    assert run_main(main, ["--config_path", str(tiny_world.config), *wrong]) == 2
    assert said in capsys.readouterr().err
