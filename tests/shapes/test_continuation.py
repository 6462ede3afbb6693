"""Continued clips: their distance from the truth, and the command."""

import json

import numpy as np
import pytest

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


def test_two_models_are_compared_scene_by_scene(tiny_world, tmp_path, monkeypatch, capsys):
    """A shape that is not seen by one of them is no pair."""
    given = ["--config_path", tiny_world.config, "--scenes", 2, "--blocks", 2]
    out, other = tmp_path / "out.json", tmp_path / "other.json"
    of_scenes = iter([[[1.0, 2.0, 3.0, 4.0, 5.0]], [[3.0, 2.0, 5.0, np.nan, 9.0]]])
    monkeypatch.setattr(continuation, "distances", lambda *_: np.array(next(of_scenes)))
    command = [str(a) for a in (*given, "--against", other, "width=32", "device=cpu")]
    figures = {"scenes": 2, "start": 4.0, "blocks": 2}
    other.write_text(
        json.dumps({**figures, "scenes_off": [[1, 1, 1, 1, None], [1, 2, 3, 4, None]]})
    )
    assert run_main(main, [*command, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["difference"]
    assert [each[0] for each in found] == [1, 0.5, 2, 3, None]
    assert "1.00 [" in capsys.readouterr().out
    other.write_text(json.dumps({**figures, "start": 5.0, "scenes_off": [[1.0] * 5] * 2}))
    assert run_main(main, command) == 2
    assert "is of other --scenes, --start or --blocks" in capsys.readouterr().err


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
